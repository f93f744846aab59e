# SPDX-License-Identifier: Apache-2.0
"""Mean, variance and norms of the rows of a site, for each step and CFG branch, in one pass."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

_CHUNK = 1 << 17  # elements looked at together: 1 MiB in float64 stays in the cache

Cell = tuple[int, int]


@dataclass
class RunningStatistics:
    """Mean, squares and norms of rows [n, C], updated as they come; every number is float64.

    Attributes:
        count: rows seen.
        mean: [C].
        m2: sum over rows of (x - mean)^2 [C].
        norm_sum: sum over rows of |x|.
        norm_squares: sum over rows of |x|^2.
        norm_max: largest |x|.
    """

    count: int
    mean: Tensor
    m2: Tensor
    norm_sum: float = 0.0
    norm_squares: float = 0.0
    norm_max: float = 0.0

    @classmethod
    def empty(cls, width: int) -> Self:
        """Return statistics of no rows."""
        zero = torch.zeros(width, dtype=torch.float64)
        return cls(0, zero, zero.clone())

    def add(self, rows: Tensor) -> None:
        """Add rows [n, C] of any float dtype on the CPU.

        NaN and infinity are not refused; they show in `finite`.
        """
        step = max(1, _CHUNK // max(1, rows.shape[1]))
        for start in range(0, len(rows), step):
            part = rows[start : start + step].detach().to(torch.float64, copy=True)
            norms = torch.linalg.vector_norm(part, dim=1)
            mean = part.mean(0)
            m2 = part.sub_(mean).square_().sum(0)
            sums = float(norms.sum()), float(norms.square().sum()), float(norms.max())
            self.merge(RunningStatistics(len(part), mean, m2, *sums))

    def merge(self, other: RunningStatistics) -> None:
        """Add the rows that another one has seen.

        Source: Chan, Golub and LeVeque 1979, the pairwise update of mean and m2.
        """
        if other.count == 0:
            return
        total = self.count + other.count
        delta = other.mean - self.mean
        self.mean.add_(delta, alpha=other.count / total)
        self.m2.add_(other.m2).addcmul_(delta, delta, value=self.count * other.count / total)
        self.count = total
        self.norm_sum += other.norm_sum
        self.norm_squares += other.norm_squares
        self.norm_max = max(self.norm_max, other.norm_max)

    @property
    def variance(self) -> Tensor:
        """m2 / count [C] (the population's, not the sample's)."""
        return self.m2 / max(1, self.count)

    @property
    def scale(self) -> float:
        """Root mean square of the centred entries: sqrt(sum_c variance_c / C); 1 if that is 0."""
        value = float(self.variance.mean().sqrt())
        return value if value > 0 else 1.0

    @property
    def mean_norm(self) -> float:
        """Mean of |x|."""
        return self.norm_sum / max(1, self.count)

    def finite(self) -> bool:
        """Whether every row seen was finite."""
        return math.isfinite(self.norm_sum)


class Statistics:
    """Running statistics of one site by (step, branch number)."""

    def __init__(self, width: int, cells: Mapping[Cell, RunningStatistics] | None = None) -> None:
        self.width = width
        self.cells: dict[Cell, RunningStatistics] = dict(cells or {})

    def at(self, cell: Cell) -> RunningStatistics:
        """Return the statistics of a cell, made if it is new."""
        if cell not in self.cells:
            self.cells[cell] = RunningStatistics.empty(self.width)
        return self.cells[cell]

    def merge(self, other: Statistics) -> None:
        """Add the rows that another one has seen."""
        for cell, one in other.cells.items():
            self.at(cell).merge(one)

    def total(
        self, steps: Iterable[int] | None = None, branches: Iterable[int] | None = None
    ) -> RunningStatistics:
        """Return the statistics of all rows at some steps and branches (None = all) together."""
        result = RunningStatistics.empty(self.width)
        for _, one in sorted(self.select(steps, branches).cells.items()):
            result.merge(one)
        return result

    def select(
        self, steps: Iterable[int] | None = None, branches: Iterable[int] | None = None
    ) -> Statistics:
        """Keep the cells of some steps and branches (None = all), without copying them."""
        wanted_steps = None if steps is None else set(steps)
        wanted_branches = None if branches is None else set(branches)
        kept = {
            (step, branch): one
            for (step, branch), one in self.cells.items()
            if (wanted_steps is None or step in wanted_steps)
            and (wanted_branches is None or branch in wanted_branches)
        }
        return Statistics(self.width, kept)

    def per_step(self, branches: Iterable[int] | None = None) -> tuple[Tensor, Tensor]:
        """Tables for normalising a row by its step: (x - mean[step]) / scale[step].

        Returns:
            mean [S, C] and scale [S] float32, S = last step seen + 1. A step without rows has
            mean 0 and scale 1.
        """
        kept = None if branches is None else list(branches)
        steps = 1 + max((step for step, _ in self.cells), default=0)
        mean = torch.zeros(steps, self.width)
        scale = torch.ones(steps)
        for step in sorted({step for step, _ in self.cells}):
            one = self.total([step], kept)
            if one.count:
                mean[step], scale[step] = one.mean.float(), one.scale
        return mean, scale

    def to_tensors(self, site: str) -> dict[str, Tensor]:
        """Tensors of a safetensors file, named `site/...`."""
        order = sorted(self.cells)
        held = [self.cells[cell] for cell in order]
        norms = [[m.norm_sum, m.norm_squares, m.norm_max] for m in held]
        empty = torch.zeros(0, self.width, dtype=torch.float64)
        return {
            f"{site}/cells": torch.tensor(order, dtype=torch.int64).reshape(-1, 2),
            f"{site}/count": torch.tensor([m.count for m in held], dtype=torch.int64),
            f"{site}/mean": torch.stack([m.mean for m in held]) if held else empty,
            f"{site}/m2": torch.stack([m.m2 for m in held]) if held else empty,
            f"{site}/norms": torch.tensor(norms, dtype=torch.float64).reshape(-1, 3),
        }

    @classmethod
    def from_tensors(cls, site: str, width: int, tensors: Mapping[str, Tensor]) -> Self:
        """Read what `to_tensors` wrote."""
        cells: dict[Cell, RunningStatistics] = {}
        order = tensors[f"{site}/cells"].tolist()
        for place, (step, branch) in enumerate(order):
            norms = tensors[f"{site}/norms"][place].tolist()
            cells[step, branch] = RunningStatistics(
                int(tensors[f"{site}/count"][place]),
                tensors[f"{site}/mean"][place].clone(),
                tensors[f"{site}/m2"][place].clone(),
                *norms,
            )
        return cls(width, cells)
