# SPDX-License-Identifier: Apache-2.0
"""Sparse codes as plain lists of entries: what the references of the sparse ops share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Elements of the [entries, width] products that a reference holds at a time.
_HELD = 1 << 24


class Entries(NamedTuple):
    """Codes in storage order; entries that are not `valid` stand for nothing."""

    row: Tensor  # [E] int64, clamped into [0, N)
    feature: Tensor  # [E] int64, clamped into [0, F)
    value: Tensor  # [E], 0 where not valid
    valid: Tensor  # [E] bool


def code_rows(values: Tensor, offsets: Tensor | None) -> int:
    """Number of rows N of codes."""
    return values.shape[0] if offsets is None else offsets.shape[0] - 1


def entries(
    values: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    features: int,
    first_feature: int = 0,
) -> Entries:
    """Flatten fixed-width codes [N, K] or CSR codes [nnz] into a list of entries.

    Valid are the entries before offsets[N] whose index lies in
    [first_feature, first_feature + features); their index is counted from first_feature.

    Args:
        values: [N, K], or [nnz] with offsets.
        indices: int32, shape of values.
        offsets: [N + 1] int64, or None for the fixed width.
        features: F.
        first_feature: id of the first feature held.
    """
    rows = code_rows(values, offsets)
    place = torch.arange(values.numel(), device=values.device)
    if offsets is None:
        row = place // max(1, values.shape[1])
    else:
        row = torch.searchsorted(offsets[1:].contiguous(), place, right=True)
    index = indices.reshape(-1).long() - first_feature
    valid = (row < rows) & (index >= 0) & (index < features)
    value = torch.where(valid, values.reshape(-1), 0.0)
    return Entries(
        row.clamp(max=max(0, rows - 1)), index.clamp(0, max(0, features - 1)), value, valid
    )


def parts(count: int, width: int) -> Iterator[slice]:
    """Slices of `count` entries whose products with rows of `width` fit a bounded buffer."""
    step = max(1, _HELD // max(1, width))
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def add_scaled_rows(
    out: Tensor, to: Tensor, scale: Tensor, valid: Tensor, table: Tensor, pick: Tensor
) -> Tensor:
    """Return out with out[to[e]] += scale[e] * table[pick[e]] for every valid e.

    Args:
        out: [A, C].
        to: [E] int64 into A.
        scale: [E].
        valid: [E] bool.
        table: [B, C].
        pick: [E] int64 into B.
    """
    if out.shape[0] == 0 or table.shape[0] == 0:
        return out
    for part in parts(to.shape[0], out.shape[1]):
        rows = table.index_select(0, pick[part]).to(out.dtype)
        product = torch.where(valid[part, None], scale[part, None].to(out.dtype) * rows, 0.0)
        out = out.index_add(0, to[part], product)
    return out


def dot_rows(a: Tensor, i: Tensor, b: Tensor, j: Tensor, valid: Tensor) -> Tensor:
    """Return <a[i[e]], b[j[e]]> [E] in the wider dtype, 0 where not valid."""
    wide = torch.promote_types(a.dtype, b.dtype)
    if a.shape[0] == 0 or b.shape[0] == 0:
        return torch.zeros(i.shape[0], dtype=wide, device=a.device)
    dots = [
        (a.index_select(0, i[p]).to(wide) * b.index_select(0, j[p]).to(wide)).sum(-1)
        for p in parts(i.shape[0], a.shape[1])
    ]
    found = torch.cat(dots) if dots else torch.zeros(0, dtype=wide, device=a.device)
    return torch.where(valid, found, 0.0)


def accumulator(*tensors: Tensor) -> torch.dtype:
    """float64 where one of the tensors is, else float32."""
    wide = any(t.dtype == torch.float64 for t in tensors)
    return torch.float64 if wide else torch.float32
