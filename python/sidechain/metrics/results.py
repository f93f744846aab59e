# SPDX-License-Identifier: Apache-2.0
"""What studies measure: impacts of sites and curves of arms, which reports then show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .bootstrap import Interval

#: Share of what should stay that an operating point has to keep.
KEPT_FLOOR = 0.8


@dataclass(frozen=True)
class Impacts:
    """Impact of sites (or windows of sites) on concepts, as one scorer reads it.

    Attributes:
        sites: names in network order [L], for example "cross:3" or "cross:3-4".
        concepts: concept names [C].
        impacts: one interval per concept and site [C][L]; NaN where undefined.
        means: mean over concepts of every site [L].
    """

    sites: Sequence[str]
    concepts: Sequence[str]
    impacts: Sequence[Sequence[Interval]]
    means: Sequence[Interval]

    def __post_init__(self) -> None:
        rows = [len(row) for row in self.impacts]
        sites = len(self.sites)
        if rows != [sites] * len(self.concepts) or len(self.means) != sites or not rows:
            raise ValueError(
                f"Impacts: expected impacts [C][L] and means [L] with C={len(self.concepts)} "
                f"(concepts) and L={sites} (sites), got rows of {rows} and {len(self.means)} means"
            )


@dataclass(frozen=True)
class ArmCurve:
    """One arm of a sweep as one scorer reads it.

    Attributes:
        strength: strengths [N], ascending.
        score: concept score at each, for example P(concept).
        distance: distance to the clip of strength 0 at each.
        kept: share of clips that keep what should stay at each.
        auc: area of the gain over distance up to the cut-off; NaN where undefined.
        smoothness: unevenness of the climb; NaN where undefined.
    """

    strength: Sequence[float]
    score: Sequence[Interval]
    distance: Sequence[Interval]
    kept: Sequence[Interval]
    auc: float
    smoothness: float

    def __post_init__(self) -> None:
        lengths = [len(self.score), len(self.distance), len(self.kept)]
        if lengths != [len(self.strength)] * 3 or not self.strength:
            raise ValueError(
                f"ArmCurve: expected score, distance and kept [N] with N={len(self.strength)} "
                f"(strength), got {lengths}"
            )

    def best_point(self, floor: float = KEPT_FLOOR) -> int | None:
        """Index of the largest score among strengths != 0 that keep at least `floor`."""
        allowed = [
            index
            for index, strength in enumerate(self.strength)
            if strength and self.kept[index].value >= floor
        ]
        return max(allowed, key=lambda index: self.score[index].value, default=None)
