# SPDX-License-Identifier: Apache-2.0
"""First weights: rows drawn block by block, so that every shard can draw its own; biases."""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 1024


def random_rows(seed: int, stream: int, start: int, stop: int, width: int) -> Tensor:
    """Return rows [start, stop) of a random table [F, width] with rows of norm 1, float32.

    Each block of rows has a generator of its own: the table does not depend on how it is cut.

    Args:
        seed: of the table.
        stream: another number gives another table.
        start: first row.
        stop: behind the last row.
        width: of a row.
    """
    parts = []
    for block in range(start // _BLOCK, -(-stop // _BLOCK)):
        generator = torch.Generator().manual_seed(mix(seed, stream, block))
        rows = torch.randn(_BLOCK, width, generator=generator)
        first = block * _BLOCK
        parts.append(rows[max(0, start - first) : stop - first])
    table = torch.cat(parts) if parts else torch.zeros(0, width)
    return table / table.norm(dim=1, keepdim=True)


def geometric_median(x: Tensor, *, iterations: int = 100, tolerance: float = 1e-5) -> Tensor:
    """Return the point with the least sum of distances to rows x [N, d], on their device.

    Weiszfeld's iteration from the mean, in float64. A fixed number of rounds without reading a
    value back; rounds after convergence (movement below `tolerance` times the spread) change
    nothing.
    """
    rows = x.double()
    point = rows.mean(0)
    spread = (rows - point).norm(dim=1).mean()
    done = torch.zeros((), dtype=torch.bool, device=x.device)
    for _ in range(iterations):
        distance = (rows - point).norm(dim=1).clamp(min=1e-12)
        weight = 1 / distance
        moved = (weight[:, None] * rows).sum(0) / weight.sum()
        step = (moved - point).norm()
        point = torch.where(done, point, moved)
        done = done | (step <= tolerance * spread)
    return point.to(x.dtype)


def mix(*numbers: int) -> int:
    """Return one seed made of several numbers, well spread (SplitMix64's finaliser)."""
    state = 0
    for number in numbers:
        state = (state + 0x9E3779B97F4A7C15 + number) % (1 << 64)
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % (1 << 64)
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % (1 << 64)
        state ^= state >> 31
    return state >> 1
