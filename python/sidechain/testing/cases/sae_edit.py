# SPDX-License-Identifier: Apache-2.0
"""Cases of `sae_edit_`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...ops.sae_structs import edit_structs
from .sparse_decode import random_codes


@dataclass(frozen=True)
class EditCase:
    """One call of `sae_edit_`; every flag adds the argument of that name."""

    rows: int
    width: int
    features: int
    k: int
    csr: bool = False
    old: bool = True
    new: bool = True
    strength: int | None = None  # 1 or N
    mask: bool = False
    shared: bool = False  # one row of codes expanded over all rows
    w_dtype: torch.dtype | None = None  # of w_dec, None = that of x

    @property
    def name(self) -> str:
        """Readable id."""
        form = "csr" if self.csr else "shared" if self.shared else "topk"
        return f"{form}-N{self.rows}-d{self.width}-F{self.features}-k{self.k}"

    def make(self, dtype: torch.dtype, seed: int = 0, device: str = "cpu") -> dict[str, Any]:
        """Random arguments in the names of the schema; x has the dtype."""
        g = torch.Generator().manual_seed(seed + 4)
        rows = 1 if self.shared else self.rows
        codes = random_codes(rows, self.features, self.k, csr=self.csr, seed=seed)
        if self.shared:
            codes = {k: v.expand(self.rows, self.k) for k, v in codes.items()}
        values = codes["values"]
        changed = torch.where(torch.rand(values.shape, generator=g) < 0.5, values, 2.0 * values)
        args: dict[str, Any] = {
            "x": torch.randn(self.rows, self.width, generator=g).to(dtype),
            "values_old": values if self.old else None,
            "values_new": changed if self.new else None,
            "indices": codes["indices"],
            "offsets": codes.get("offsets"),
            "w_dec": torch.randn(self.features, self.width, generator=g).to(self.w_dtype or dtype),
            "strength": None,
            "mask": None,
        }
        if self.strength is not None:
            args["strength"] = torch.linspace(-1.0, 2.0, self.strength)
        if self.mask:
            args["mask"] = torch.rand(self.rows, generator=g) < 0.6
        return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in args.items()}


def edit_call(args: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and keyword arguments of `sae_edit_` for those of its schema."""
    *first, strength, mask = edit_structs([*args.values()])
    return tuple(first), {"strength": strength, "mask": mask}


_case = EditCase(21, 96, 150, 6)
EDIT_CASES = (
    _case,
    replace(_case, csr=True, strength=21, mask=True),
    replace(_case, old=False, strength=1, width=111),
    replace(_case, new=False, rows=70, width=1536, k=3),
    replace(_case, shared=True, strength=21, width=33),
    replace(_case, w_dtype=torch.float32),
    replace(_case, w_dtype=torch.float16),
    # More entries than a kernel holds at a time, and more channels than its block owns at once.
    EditCase(2, 1288, 700, 600),
    replace(_case, width=1, features=1, k=1),
    EditCase(0, 16, 8, 2),
    EditCase(4, 16, 8, 0, mask=True),
)
EDIT_BENCH = (
    EditCase(8200, 1536, 12288, 4, strength=8200),
    EditCase(8200, 1536, 12288, 32),
)
