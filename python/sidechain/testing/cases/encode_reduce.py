# SPDX-License-Identifier: Apache-2.0
"""Cases of `code_sums_`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .sparse_decode import random_codes


@dataclass(frozen=True)
class SumsCase:
    """One call of `code_sums_`; buffers start with a known content."""

    rows: int
    features: int
    k: int
    labels: int = 1
    label: bool = False
    csr: bool = False

    @property
    def name(self) -> str:
        """Readable id."""
        form = "csr" if self.csr else "topk"
        return f"{form}-N{self.rows}-F{self.features}-k{self.k}-G{self.labels}"

    def make(self, seed: int = 0, device: str = "cpu") -> dict[str, Any]:
        """Random arguments in the names of the schema; some labels lie outside."""
        g = torch.Generator().manual_seed(seed + 3)
        args: dict[str, Any] = {"offsets": None, "label": None}
        args |= random_codes(self.rows, self.features, self.k, csr=self.csr, seed=seed)
        if self.label:
            args["label"] = torch.randint(-1, self.labels + 1, (self.rows,), generator=g)
        shape = (self.labels, self.features)
        args["sums"] = torch.randn(shape, generator=g)
        args["squares"] = torch.rand(shape, generator=g)
        args["counts"] = torch.randint(0, 9, shape, generator=g)
        args["rows"] = torch.randint(0, 9, (self.labels,), generator=g)
        return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in args.items()}


SUMS_CASES = (
    SumsCase(40, 60, 8),
    SumsCase(40, 60, 8, labels=4, label=True),
    SumsCase(33, 200, 12, labels=7, label=True, csr=True),
    SumsCase(500, 5, 3, labels=2, label=True),
    SumsCase(0, 5, 3, labels=2, label=True),
    SumsCase(9, 5, 0, labels=2, label=True),
    SumsCase(1300, 3, 2),  # lists longer than a kernel's piece
    # The CUDA sort takes digits of up to 11 bits, 2,048 entries a chunk, chunks in 128 tiles.
    SumsCase(260, 2048, 8),  # the most cells of one digit, two tiles
    SumsCase(300, 683, 9, labels=3, label=True, csr=True),  # one cell more: two digits
    SumsCase(2100, 2500, 128),  # tiles of two chunks
    SumsCase(30, 70000, 3, labels=61, label=True),  # three digits
)
SUMS_BENCH = (SumsCase(4096, 12288, 32, labels=20, label=True),)
