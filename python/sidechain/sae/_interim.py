# SPDX-License-Identifier: Apache-2.0
"""Plain torch forms of the ops, dense, until the ops are here."""

from __future__ import annotations

import torch
from torch import Tensor


def sparse_decode(
    values: Tensor,
    indices: Tensor,
    w_dec: Tensor,
    b_dec: Tensor | None = None,
    *,
    offsets: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    if offsets is None:
        n = len(values)
        rows = torch.arange(n, device=values.device)[:, None].expand_as(values)
    else:
        n = len(offsets) - 1
        rows = torch.repeat_interleave(torch.arange(n, device=values.device), offsets.diff())
    live = indices >= 0
    parts = values[live][:, None] * w_dec[indices[live].long()]
    total = torch.zeros(n, w_dec.shape[1], dtype=w_dec.dtype, device=w_dec.device)
    total = total.index_add(0, rows[live], parts)
    return total if b_dec is None else total + b_dec
