# SPDX-License-Identifier: Apache-2.0
"""Resampling of tables over steps from one time grid to another."""

from __future__ import annotations

import torch
from torch import Tensor


def same_grid(a: Tensor, b: Tensor) -> bool:
    """Tell whether two time grids are equal up to the rounding of float32."""
    return a.shape == b.shape and torch.allclose(
        a.to("cpu", torch.float64), b.to("cpu", torch.float64), rtol=1e-4, atol=1e-6
    )


def resample(table: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """Interpolate the rows of a table linearly over time.

    Args:
        table: [S, C].
        source: timesteps of its rows [S], monotonic.
        target: timesteps wanted [N]; outside of `source` the nearest row is used.

    Returns:
        [N, C], dtype of the table.
    """
    source = source.to("cpu", torch.float64)
    target = target.to("cpu", torch.float64)
    order = torch.argsort(source, stable=True)
    times = source[order]
    rows = table[order.to(table.device)].to(torch.float64)
    if len(times) == 1:
        return rows.expand(len(target), -1).to(table.dtype).clone()
    right = torch.searchsorted(times, target).clamp(1, len(times) - 1)
    left = right - 1
    width = times[right] - times[left]
    share = torch.where(width > 0, (target - times[left]) / width.clamp(min=1e-300), 0.0)
    share = share.clamp(0.0, 1.0).to(table.device)[:, None]
    left, right = left.to(table.device), right.to(table.device)
    return torch.lerp(rows[left], rows[right], share).to(table.dtype)
