# SPDX-License-Identifier: Apache-2.0
"""Reference of ``code_sums_``: sums, sums of squares and firing counts of codes for each label."""

from __future__ import annotations

import torch
from torch import Tensor

from .codes import code_rows, entries


def code_sums_(
    values: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    label: Tensor | None,
    sums: Tensor,
    squares: Tensor,
    counts: Tensor,
    rows: Tensor,
) -> None:
    """Add the codes to sums, squares, counts [G, F] and the rows seen to rows [G], in place.

    The contract is that of `sidechain.ops.code_sums_`.
    """
    labels, features = sums.shape
    n = code_rows(values, offsets)
    e = entries(values, indices, offsets, features)
    if label is None:
        label = torch.zeros(n, dtype=torch.int64, device=values.device)
    known = (label >= 0) & (label < labels)
    group = label.clamp(0, max(0, labels - 1))
    if labels:
        rows.index_add_(0, group, known.to(rows.dtype))
    if labels == 0 or features == 0 or n == 0:
        return
    counted = e.valid & (e.value != 0) & known.index_select(0, e.row)
    cell = group.index_select(0, e.row) * features + e.feature
    value = torch.where(counted, e.value, 0.0)
    for buffer, addend in (
        (sums, value), (squares, value.square()), (counts, counted.to(counts.dtype))
    ):  # fmt: skip
        total = torch.zeros(labels * features, dtype=buffer.dtype, device=buffer.device)
        buffer.add_(total.index_add(0, cell, addend.to(buffer.dtype)).view_as(buffer))
