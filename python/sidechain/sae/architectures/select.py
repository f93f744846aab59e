# SPDX-License-Identifier: Apache-2.0
"""Find the k largest of features that several processes hold, exactly, without reading counts back.

Every process offers its own candidates; what does not belong to the whole's largest is blanked
(value 0, index -1), which the sparse ops take as nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...ops import Codes

if TYPE_CHECKING:
    from ..training.mesh import Mesh

# 31 bits of a positive float32, most significant first: (shift, bits) of each digit.
_VALUE_DIGITS = ((20, 11), (10, 10), (0, 10))
_POSITION_BITS = 11


def keep_row_largest(codes: Codes, k: int, mesh: Mesh) -> Codes:
    """Keep the k largest of every row over all slices of the features.

    Args:
        codes: own candidates [N, K'], as `topk_encode` gives them.
        k: number to keep; ties: the lower feature wins.
        mesh: features are held in ascending order of its slices.
    """
    values = codes.values
    if mesh.features == 1 and values.shape[1] <= k:
        return codes
    width = values.shape[1]
    every = mesh.gather_features(values[None])  # [slices, N, K']
    every = every.permute(1, 0, 2).reshape(len(values), -1)
    # Slices and their entries stand in the order in which ties win; the sort is stable.
    order = torch.sort(every, dim=1, descending=True, stable=True).indices[:, :k]
    keep = torch.zeros_like(every, dtype=torch.bool).scatter_(1, order, True)
    mine = keep[:, mesh.feature_rank * width : (mesh.feature_rank + 1) * width]
    return _blank(codes, mine)


def keep_batch_largest(codes: Codes, total: int, mesh: Mesh, features: int) -> Codes:
    """Keep the `total` largest entries of the whole batch over all processes.

    Exact by radix selection on the bits of the values: three all-reduces of a histogram, then as
    many as the positions need to break ties (lowest row-major position wins).

    Args:
        codes: own candidates in CSR form, indices local to the slice.
        total: number to keep.
        mesh: the processes.
        features: F of the whole dictionary.
    """
    if mesh.world == 1:
        return codes
    values, indices, offsets = codes
    if offsets is None:
        raise TypeError("keep_batch_largest: expected codes in CSR form, got fixed width")
    key = values.contiguous().view(torch.int32).long()
    live = indices >= 0
    left = torch.full((), total, dtype=torch.int64, device=values.device)
    prefix = torch.zeros((), dtype=torch.int64, device=values.device)
    for shift, bits in _VALUE_DIGITS:
        inside = live & ((key >> (shift + bits)) == prefix)
        counts = _histogram((key >> shift) & ((1 << bits) - 1), inside, bits, mesh)
        above = counts.flip(0).cumsum(0).flip(0)  # entries with this digit or a larger one
        digit = ((above >= left).sum() - 1).clamp(min=0)
        left = left - (above[digit] - counts[digit])
        prefix = (prefix << bits) | digit
    tied = live & (key == prefix)
    rows = torch.arange(len(offsets) - 1, device=values.device)
    row = torch.repeat_interleave(rows, offsets.diff(), output_size=len(values))
    position = (row + mesh.data_rank * len(rows)) * features
    position = position + indices + mesh.shard(features)[0]
    last = _position_of(tied, position, left, mesh, len(rows) * mesh.data * features)
    return _blank(codes, (live & (key > prefix)) | (tied & (position <= last)))


def _position_of(tied: Tensor, position: Tensor, count: Tensor, mesh: Mesh, limit: int) -> Tensor:
    """Return the position of the `count`-th of the tied entries, in ascending order."""
    shift = -(-max(1, (limit - 1).bit_length()) // _POSITION_BITS) * _POSITION_BITS
    prefix = torch.zeros_like(count)
    left = count
    while shift:
        shift -= _POSITION_BITS
        inside = tied & ((position >> (shift + _POSITION_BITS)) == prefix)
        digits = (position >> shift) & ((1 << _POSITION_BITS) - 1)
        counts = _histogram(digits, inside, _POSITION_BITS, mesh)
        below = counts.cumsum(0)  # entries with this digit or a smaller one
        digit = (below < left).sum().clamp(max=len(counts) - 1)
        left = left - (below[digit] - counts[digit])
        prefix = (prefix << _POSITION_BITS) | digit
    return prefix


def _histogram(digits: Tensor, inside: Tensor, bits: int, mesh: Mesh) -> Tensor:
    counts = torch.zeros(1 << bits, dtype=torch.int64, device=digits.device)
    counts.index_add_(0, digits, inside.long())
    return mesh.sum_all(counts)


def _blank(codes: Codes, keep: Tensor) -> Codes:
    values = torch.where(keep, codes.values, 0.0)
    return Codes(values, torch.where(keep, codes.indices, -1), codes.offsets)
