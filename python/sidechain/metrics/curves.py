# SPDX-License-Identifier: Apache-2.0
"""Alignment against preservation over a strength sweep: AUC and smoothness, as published.

One sweep is three arrays over strengths: `alpha` (its sign is the direction), `x` (distance to the
unsteered output, 0 at alpha = 0) and `m` (alignment with the concept). Every quantity is computed
per direction s in {+1, -1} on delta = s (m - m at alpha = 0) and then averaged over directions.

Source: definitions behind the tables of arXiv:2602.11910 (GitHub `luk-st/steer-audio`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

BOTH = (1, -1)
KEEP_SLACK = 1e-9  # a point this little past the cut-off counts as inside
LEAST_GAIN = 1e-9  # below it a direction never moves towards the concept


@dataclass(frozen=True)
class Direction:
    """One direction of a sweep, in order of |alpha|, its first point being alpha = 0.

    Attributes:
        strength: |alpha| [N], ascending from 0.
        distance: x [N], 0 first.
        gain: delta [N], 0 first; not clipped.
    """

    strength: Array
    distance: Array
    gain: Array


@dataclass(frozen=True)
class CurveScore:
    """Scores of one sweep: the mean over directions and the value of each.

    Attributes:
        auc: area of gain over distance up to the cut-off; higher is better; NaN where undefined.
        smoothness: standard deviation of relative gaps; lower is better; NaN where undefined.
        auc_by_sign: value per direction, keys of `limits`.
        smoothness_by_sign: value per direction, keys of `limits`.
    """

    auc: float
    smoothness: float
    auc_by_sign: Mapping[int, float]
    smoothness_by_sign: Mapping[int, float]


def direction(x: ArrayLike, m: ArrayLike, alpha: ArrayLike, sign: int) -> Direction:
    """Select and orient the points of one direction.

    Args:
        x: distances [N], finite, >= 0 and 0 at alpha = 0.
        m: alignments [N], finite.
        alpha: strengths [N], finite, no value twice, 0 among them.
        sign: +1 or -1.

    Returns:
        The points of that sign and alpha = 0, ordered by |alpha|.

    Raises:
        ValueError: shapes differ or a condition above does not hold.
    """
    distances, alignments, strengths = _checked(x, m, alpha)
    if sign not in BOTH:
        raise ValueError(f"direction: expected sign +1 or -1, got {sign!r}")
    chosen = np.flatnonzero(np.sign(strengths) * sign >= 0)
    chosen = chosen[np.argsort(np.abs(strengths[chosen]), kind="stable")]
    gain = sign * (alignments[chosen] - alignments[chosen[0]])
    return Direction(np.abs(strengths[chosen]), distances[chosen], gain)


def reach(x: ArrayLike, alpha: ArrayLike, sign: int) -> float:
    """Return the largest distance among points of that sign; NaN when there is none."""
    distances, _, strengths = _checked(x, np.zeros_like(np.asarray(x, dtype=float)), alpha)
    inside = distances[np.sign(strengths) == sign]
    return float(inside.max()) if inside.size else math.nan


def cutoff(sweeps: Iterable[tuple[ArrayLike, ArrayLike]], sign: int) -> float:
    """Return the cut-off of one direction: the smallest `reach` among reference sweeps.

    Args:
        sweeps: pairs (x, alpha) of the reference methods.
        sign: +1 or -1.

    Returns:
        The cut-off; NaN (the direction is undefined) if a reference has no point there.
    """
    reaches = [reach(x, alpha, sign) for x, alpha in sweeps]
    if not reaches:
        raise ValueError("cutoff: expected at least one reference sweep, got none")
    return float(np.min(reaches))  # NaN propagates


def auc(points: Direction, limit: float) -> float:
    """Return the area under gain over distance, up to `limit`.

    Kept are the points with distance <= limit, wherever they stand in the sweep. If any was
    dropped, the line from the kept point of largest distance to the dropped point of smallest
    distance is followed to the limit. The trapezoid rule runs in order of |alpha|, so where the
    distance steps back area is subtracted.

    Args:
        points: one direction of a sweep.
        limit: the cut-off; NaN gives NaN.

    Returns:
        The area; NaN with fewer than two points.
    """
    if math.isnan(limit):
        return math.nan
    kept = points.distance <= limit + KEEP_SLACK
    strength, distance, gain = points.strength[kept], points.distance[kept], points.gain[kept]
    if not kept.all():
        last = int(np.argmax(distance))
        dropped = np.flatnonzero(~kept)
        beyond = int(dropped[np.argmin(points.distance[dropped])])
        share = (limit - distance[last]) / (points.distance[beyond] - distance[last])
        edge = gain[last] + (points.gain[beyond] - gain[last]) * share
        place = int(np.searchsorted(strength, points.strength[beyond]))
        distance = np.insert(distance, place, limit)
        gain = np.insert(gain, place, edge)
    if distance.size < 2:
        return math.nan
    return float(np.sum(np.diff(distance) * (gain[1:] + gain[:-1]) / 2))


def smoothness(points: Direction, limit: float) -> float:
    """Return the population standard deviation of the gaps of gain / largest gain.

    Only kept points count (no boundary point), in order of |alpha| from alpha = 0.

    Args:
        points: one direction of a sweep.
        limit: the cut-off; NaN gives NaN.

    Returns:
        The deviation, 0 for an even climb; NaN where no kept point gains anything.
    """
    if math.isnan(limit):
        return math.nan
    gain = points.gain[points.distance <= limit + KEEP_SLACK]
    largest = float(gain.max())
    if largest <= LEAST_GAIN:
        return math.nan
    return float(np.std(np.diff(gain) / largest))


def score(x: ArrayLike, m: ArrayLike, alpha: ArrayLike, limits: Mapping[int, float]) -> CurveScore:
    """Score one sweep in the directions of `limits`.

    Args:
        x: distances [N].
        m: alignments [N], any scorer's.
        alpha: strengths [N].
        limits: cut-off per direction, for example `{1: 3.8, -1: 3.5}`; one key scores one side.

    Returns:
        The scores; a mean is undefined (NaN) if the value of any direction is.
    """
    if not limits:
        raise ValueError("score: expected a cut-off for +1 or -1 or both in limits, got none")
    sides = {sign: direction(x, m, alpha, sign) for sign in limits}
    areas = {sign: auc(sides[sign], limit) for sign, limit in limits.items()}
    unevenness = {sign: smoothness(sides[sign], limit) for sign, limit in limits.items()}
    return CurveScore(
        float(np.mean(list(areas.values()))),
        float(np.mean(list(unevenness.values()))),
        areas,
        unevenness,
    )


def _checked(x: ArrayLike, m: ArrayLike, alpha: ArrayLike) -> tuple[Array, Array, Array]:
    distances, alignments, strengths = (np.asarray(v, dtype=np.float64) for v in (x, m, alpha))
    if strengths.ndim != 1 or not distances.shape == alignments.shape == strengths.shape:
        raise ValueError(
            "curves: expected x, m and alpha of one shape [N], "
            f"got {list(distances.shape)}, {list(alignments.shape)}, {list(strengths.shape)}"
        )
    for label, values in (("x", distances), ("m", alignments), ("alpha", strengths)):
        if not np.isfinite(values).all():
            bad = values[~np.isfinite(values)][0]
            raise ValueError(f"curves: expected finite {label}, got {bad}")
    if np.unique(strengths).size != strengths.size:
        values, counts = np.unique(strengths, return_counts=True)
        raise ValueError(f"curves: expected every alpha once, got {values[counts > 1][0]:g} twice")
    start = np.flatnonzero(strengths == 0)
    if start.size != 1:
        raise ValueError(f"curves: expected a point at alpha 0, got {_few(strengths)}")
    if distances.min() < 0:
        raise ValueError(f"curves: expected distances x >= 0, got {distances.min():g}")
    if distances[start[0]] > 1e-6:
        raise ValueError(f"curves: expected x = 0 at alpha 0, got {distances[start[0]]:g}")
    return distances, alignments, strengths


def _few(values: Sequence[float] | Array) -> str:
    shown = ", ".join(f"{value:g}" for value in values[:5])
    return f"{shown}, ..." if len(values) > 5 else shown or "no points"
