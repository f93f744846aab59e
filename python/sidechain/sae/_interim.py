# SPDX-License-Identifier: Apache-2.0
"""Plain torch forms of the ops, dense, until the ops are here."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Codes(NamedTuple):
    values: Tensor
    indices: Tensor
    offsets: Tensor | None


def topk_encode(
    x: Tensor,
    w_enc: Tensor,
    b_enc: Tensor | None = None,
    b_pre: Tensor | None = None,
    *,
    k: int = 0,
    mode: str = "topk",
    threshold: float | Tensor | None = None,
    precision: str = "fp32",
    backend: str = "auto",
) -> Codes:
    x = x.to(w_enc.dtype)
    z = (x if b_pre is None else x - b_pre) @ w_enc.T
    if b_enc is not None:
        z = z + b_enc
    if mode == "topk":
        order = torch.sort(z.detach(), dim=1, descending=True, stable=True).indices[:, :k]
        values = z.gather(1, order)
        live = values > 0
        return Codes(torch.where(live, values, 0.0), torch.where(live, order, -1).int(), None)
    if mode == "batch_topk":
        flat = z.detach().flatten()
        order = torch.sort(flat, descending=True, stable=True).indices[: k * len(x)]
        order = order[flat[order] > 0].sort().values
    else:
        order = (z.detach() > torch.as_tensor(threshold).clamp(min=0)).flatten().nonzero()[:, 0]
    rows, indices = order // z.shape[1], order % z.shape[1]
    counts = torch.bincount(rows, minlength=len(x))
    offsets = torch.zeros(len(x) + 1, dtype=torch.int64, device=x.device)
    torch.cumsum(counts, 0, out=offsets[1:])
    return Codes(z.flatten()[order], indices.int(), offsets)


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
