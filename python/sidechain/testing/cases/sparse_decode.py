# SPDX-License-Identifier: Apache-2.0
"""Cases of `sparse_decode` and `sparse_decode_loss`, and the codes of every op on sparse codes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


def random_codes(
    rows: int, features: int, k: int, *, csr: bool = False, seed: int = 0, slack: int = 3
) -> dict[str, Tensor]:
    """Draw values, indices and, with `csr`, offsets, as an encoder returns them.

    Features fire with Zipf's law. Fixed width: sorted by value, about a tenth of the slots unused
    (value 0, index -1) and a few active slots of value 0. CSR: 0 to 2 k entries in a row,
    ascending, and `slack` entries of garbage behind the last row.
    """
    g = torch.Generator().manual_seed(seed)
    popularity = 1.0 / torch.arange(1, features + 1)
    shuffled = popularity[torch.randperm(features, generator=g)]
    noise = -torch.empty(rows, features).exponential_(generator=g).log()
    order = (shuffled.log() + noise).topk(min(2 * k, features)).indices
    if not csr:
        indices = order[:, :k].to(torch.int32)
        values = torch.rand(rows, k, generator=g).sort(1, descending=True).values + 0.05
        used = torch.arange(k) < k - torch.randint(0, max(1, k // 5) + 1, (rows, 1), generator=g)
        values = torch.where(torch.rand(rows, k, generator=g) < 0.02, 0.0, values)
        return {
            "values": torch.where(used, values, 0.0),
            "indices": torch.where(used, indices, -1),
        }
    counts = torch.randint(0, min(2 * k, features) + 1, (rows,), generator=g)
    lists = [order[n, : int(c)].sort().values for n, c in enumerate(counts)]
    indices = torch.cat([*lists, torch.zeros(slack, dtype=torch.int64)]).to(torch.int32)
    values = torch.rand(indices.shape[0], generator=g) + 0.05
    if slack:
        values[-slack:] = 1e9
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    return {"values": values, "indices": indices, "offsets": offsets}


@dataclass(frozen=True)
class DecodeCase:
    """One call of `sparse_decode_loss`, from which that of `sparse_decode` follows."""

    rows: int
    width: int
    features: int
    k: int
    csr: bool = False
    bias: bool = True
    row_weight: bool = False

    @property
    def name(self) -> str:
        """Readable id."""
        form = "csr" if self.csr else "topk"
        return f"{form}-N{self.rows}-d{self.width}-F{self.features}-k{self.k}"

    def make(self, dtype: torch.dtype, seed: int = 0, device: str = "cpu") -> dict[str, Any]:
        """Random arguments of `sparse_decode_loss`; w_dec and target have the dtype."""
        g = torch.Generator().manual_seed(seed + 1)
        args: dict[str, Any] = random_codes(
            self.rows, self.features, self.k, csr=self.csr, seed=seed
        )
        w = torch.randn(self.features, self.width, generator=g)
        args["w_dec"] = (w / w.norm(dim=-1, keepdim=True).clamp(min=1e-9)).to(dtype)
        args["b_dec"] = torch.randn(self.width, generator=g) if self.bias else None
        args["target"] = torch.randn(self.rows, self.width, generator=g).to(dtype)
        if self.row_weight:
            args["row_weight"] = torch.rand(self.rows, generator=g)
        return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in args.items()}


_case = DecodeCase(9, 96, 200, 8)
DECODE_CASES = (
    _case,
    replace(_case, csr=True, row_weight=True),
    replace(_case, rows=33, width=320, features=1000, k=16, row_weight=True),
    replace(_case, rows=17, width=111, k=5, csr=True, bias=False),
    replace(_case, rows=5, width=1, features=7, k=7),
    replace(_case, rows=60, width=19, features=1, k=1, bias=False),
    replace(_case, rows=70, width=1536, features=500, k=32, csr=True),
    replace(_case, rows=4, width=513, features=64, k=64),
    replace(_case, rows=1300, width=12, features=3, k=2),  # lists longer than a kernel's piece
    # More entries than a kernel holds at a time, and more channels than its block owns at once.
    replace(_case, rows=2, width=1288, features=700, k=600),
    replace(_case, rows=3, width=301, features=400, k=190, csr=True),
    # Error and decoder rows fill shared memory just below 48 KB: float32, then half precision.
    replace(_case, rows=2, width=768, k=15),
    replace(_case, rows=2, width=1024, k=11),
    replace(_case, rows=2, width=2048, k=5),
    replace(_case, rows=2, width=768, k=30),
    replace(_case, rows=2, width=1024, k=22),
    DecodeCase(0, 16, 8, 2),
    DecodeCase(3, 16, 8, 0, row_weight=True),
    DecodeCase(0, 16, 8, 2, csr=True),
    DecodeCase(2, 0, 8, 2),
)
DECODE_BENCH = (
    DecodeCase(1024, 768, 12288, 32),
    DecodeCase(1024, 1280, 5120, 10),
    DecodeCase(1024, 2560, 10240, 64),
)
