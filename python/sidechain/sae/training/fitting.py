# SPDX-License-Identifier: Apache-2.0
"""Normalisers fitted to statistics of rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...store import RunningStatistics, Statistics
from ..normaliser import Normaliser
from .checks import check_varying


def fit(statistics: Statistics, kind: str, *, centre: bool, **grid: Any) -> Normaliser:
    """Return a normaliser after which rows have mean 0 and E |y|^2 = d.

    Args:
        statistics: of the rows.
        kind: "step", "global" or "none".
        centre: subtract the mean; otherwise only scale.
        **grid: timesteps and sigmas by step, where known.

    Raises:
        InputError: rows that do not vary.
    """
    check_varying(statistics, kind)
    if kind == "none":
        return Normaliser.identity(statistics.width)
    steps = sorted({step for step, _ in statistics.cells})
    if kind == "global" or not steps:
        mean, scale = _table(statistics.total(), centre)
        return Normaliser(mean[None], scale[None])
    tables = [_table(statistics.total([step]), centre) for step in steps]
    known = {n: None if t is None else t[steps] for n, t in grid.items()}
    return Normaliser(
        torch.stack([m for m, _ in tables]),
        torch.stack([s for _, s in tables]),
        torch.tensor(steps),
        **known,
    )


def _table(known: RunningStatistics, centre: bool) -> tuple[Tensor, Tensor]:
    if centre:
        return known.mean.float(), torch.tensor(known.scale)
    second = known.norm_squares / max(1, known.count) / len(known.mean)
    return torch.zeros(len(known.mean)), torch.tensor(second**0.5 or 1.0)
