# SPDX-License-Identifier: Apache-2.0
"""Intervals: seeded percentile bootstrap over independent units, Wilson for proportions.

A unit is what was drawn independently, usually a prompt or a prompt pair: average several seeds of
one prompt first. Paired quantities resample the same units on both sides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from sidechain.metrics.impact import impact, mean_impact

Array = NDArray[np.float64]

RESAMPLES = 2000
CHUNK = 1 << 22  # numbers gathered at once: 32 MB


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval.

    Attributes:
        value: the estimate itself.
        low: lower end.
        high: upper end.
        n: units behind it.
        level: coverage aimed at.
    """

    value: float
    low: float
    high: float
    n: int = 0
    level: float = 0.95

    def __str__(self) -> str:
        """Return for example "0.49 [0.41, 0.56]"."""
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def bootstrap(
    statistic: Callable[..., Array],
    *samples: ArrayLike,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[Interval]:
    """Percentile intervals of a vectorised statistic of paired samples.

    Args:
        statistic: maps arrays [..., resample, P] (one per sample) to [..., resample], reducing the
            last axis; leading axes are rows of which each gets an interval.
        samples: arrays [P] or [..., P]; unit p is the same unit in all of them.
        level: coverage, 0 < level < 1.
        resamples: number of resamples.
        seed: seed of the resampling.

    Returns:
        One interval per row of the statistic (flattened); ends are NaN where it is NaN.
    """
    arrays = [np.asarray(sample, dtype=np.float64) for sample in samples]
    units = _units(arrays, level, resamples)
    # axis -2 stands for the resample; the full data are one "resample"
    point = statistic(*(array[..., None, :] for array in arrays))[..., 0].reshape(-1)
    generator = np.random.default_rng(seed)
    widest = max(array.size for array in arrays)
    drawn = []
    for start in range(0, resamples, step := max(1, CHUNK // widest)):
        index = generator.integers(units, size=(min(step, resamples - start), units))
        values = statistic(*(array[..., index] for array in arrays))
        drawn.append(values.reshape(-1, index.shape[0]))
    return _percentiles(point, np.concatenate(drawn, axis=1), units, level)


def mean_interval(
    values: ArrayLike, *, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Interval of the mean of values [P]."""
    return bootstrap(_mean, _vector(values), level=level, resamples=resamples, seed=seed)[0]


def difference_interval(
    first: ArrayLike,
    second: ArrayLike,
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Interval of mean(first - second) over paired units [P]."""
    a, b = _vector(first), _vector(second)
    return bootstrap(lambda x, y: _mean(x - y), a, b, level=level, resamples=resamples, seed=seed)[
        0
    ]


def ratio_interval(
    numerator: ArrayLike,
    denominator: ArrayLike,
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Interval of mean(numerator) / mean(denominator) over paired units [P]."""
    a, b = _vector(numerator), _vector(denominator)

    def ratio(x: Array, y: Array) -> Array:
        with np.errstate(divide="ignore", invalid="ignore"):
            value: Array = x.mean(axis=-1) / y.mean(axis=-1)
        return np.where(np.isfinite(value), value, np.nan)

    return bootstrap(ratio, a, b, level=level, resamples=resamples, seed=seed)[0]


def proportion_interval(successes: int, trials: int, *, level: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion.

    Args:
        successes: hits, 0 <= successes <= trials.
        trials: independent trials, >= 1.
        level: coverage, 0 < level < 1.
    Source: Wilson 1927, by `scipy.stats.binomtest`.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(
            f"proportion_interval: expected 0 <= successes <= trials and trials >= 1, "
            f"got {successes} of {trials}"
        )
    _check_level(level)
    result = stats.binomtest(successes, trials)
    ends = result.proportion_ci(confidence_level=level, method="wilson")
    return Interval(successes / trials, float(ends.low), float(ends.high), trials, level)


@dataclass(frozen=True)
class ConceptScores:
    """Localization scores of one concept per unit (prompt pair).

    Attributes:
        site: score with each site patched [L, P].
        none: score of the corrupted run [P].
        every: score of the clean run [P].
    """

    site: ArrayLike
    none: ArrayLike
    every: ArrayLike


def impact_intervals(
    scores: ConceptScores, *, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> list[Interval]:
    """Interval of the impact of every site on one concept, resampling prompt pairs."""
    site, none, every = _concept(scores)
    return bootstrap(_impacts, site, none, every, level=level, resamples=resamples, seed=seed)


def mean_impact_intervals(
    concepts: Sequence[ConceptScores],
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[Interval]:
    """Interval of the mean impact of every site over concepts.

    Prompt pairs are resampled within each concept; the concepts themselves are taken as fixed.

    Args:
        concepts: scores per concept, all with the same sites.
        level: coverage.
        resamples: number of resamples.
        seed: seed of the resampling.
    """
    arrays = [_concept(scores) for scores in concepts]
    _same_sites(arrays)
    generator = np.random.default_rng(seed)
    drawn = np.stack([_redraw(a, generator, level, resamples) for a in arrays])  # [C, L, N]
    point = mean_impact(np.stack([_impacts(s, n, e) for s, n, e in arrays]))
    flat = mean_impact(drawn.reshape(len(arrays), -1)).reshape(drawn.shape[1:])
    units = sum(none.size for _, none, _ in arrays)
    return _percentiles(point, flat, units, level)


def rank_stability_interval(
    runs: Sequence[Sequence[ConceptScores]],
    *,
    level: float = 0.95,
    resamples: int = 500,
    seed: int = 0,
) -> Interval:
    """Interval of the mean Spearman correlation of mean impacts between runs (seeds).

    Args:
        runs: scores per run and concept; unit p of a concept is the same prompt pair in all runs.
        level: coverage.
        resamples: number of resamples.
        seed: seed of the resampling.
    """
    if len(runs) < 2 or len({len(run) for run in runs}) != 1:
        raise ValueError(
            "rank_stability_interval: expected at least 2 runs with the same concepts, "
            f"got {[len(run) for run in runs]} concepts per run"
        )
    arrays = [[_concept(scores) for scores in run] for run in runs]
    _same_sites([one for run in arrays for one in run])
    points, drawn = [], []
    for run in arrays:
        generator = np.random.default_rng(seed)  # the same pairs are drawn in every run
        points.append(mean_impact(np.stack([_impacts(s, n, e) for s, n, e in run])))
        resampled = np.stack([_redraw(one, generator, level, resamples) for one in run])
        drawn.append(mean_impact(resampled.reshape(len(run), -1)).reshape(resampled.shape[1:]))
    units = sum(none.size for _, none, _ in arrays[0])
    point = np.array([_mean_rho(np.stack(points)[..., None])[0]])
    return _percentiles(point, _mean_rho(np.stack(drawn))[None], units, level)[0]


def _mean_rho(means: Array) -> Array:
    """Mean Spearman's rho over pairs of runs: means [K, L, N] -> [N]."""
    ranks = stats.rankdata(means, axis=1)
    ranks = ranks - ranks.mean(axis=1, keepdims=True)
    norms = np.sqrt((ranks**2).sum(axis=1))
    with np.errstate(divide="ignore", invalid="ignore"):
        rhos = [
            (ranks[i] * ranks[j]).sum(axis=0) / (norms[i] * norms[j])
            for i in range(len(ranks))
            for j in range(i + 1, len(ranks))
        ]
    return np.asarray(np.mean(rhos, axis=0))


def _impacts(site: Array, none: Array, every: Array) -> Array:
    """Impact of unit means: [L, ..., P], [..., P], [..., P] -> [L, ...]."""
    means = np.moveaxis(site.mean(axis=-1), 0, -1)
    return np.moveaxis(impact(means, none.mean(axis=-1), every.mean(axis=-1)), -1, 0)


def _redraw(
    arrays: tuple[Array, Array, Array],
    generator: np.random.Generator,
    level: float,
    resamples: int,
) -> Array:
    units = _units(list(arrays), level, resamples)
    index = generator.integers(units, size=(resamples, units))
    return _impacts(*(array[..., index] for array in arrays))  # [L, N]


def _percentiles(point: Array, drawn: Array, units: int, level: float) -> list[Interval]:
    intervals = []
    for value, row in zip(point, drawn, strict=True):
        defined = row[~np.isnan(row)]
        if math.isnan(value) or not defined.size:
            low = high = math.nan
        else:
            low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
        intervals.append(Interval(float(value), float(low), float(high), units, level))
    return intervals


def _mean(values: Array) -> Array:
    return np.asarray(values.mean(axis=-1))


def _vector(values: ArrayLike) -> Array:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"bootstrap: expected one value per unit [P], got {list(array.shape)}")
    return array


def _concept(scores: ConceptScores) -> tuple[Array, Array, Array]:
    site, none, every = (
        np.asarray(v, dtype=np.float64) for v in (scores.site, scores.none, scores.every)
    )
    if site.ndim != 2 or none.shape != site.shape[1:] or every.shape != site.shape[1:]:
        raise ValueError(
            "impact_intervals: expected site [L, P], none [P] and every [P], "
            f"got {list(site.shape)}, {list(none.shape)}, {list(every.shape)}"
        )
    return site, none, every


def _same_sites(arrays: Sequence[tuple[Array, Array, Array]]) -> None:
    counts = sorted({site.shape[0] for site, _, _ in arrays})
    if len(counts) != 1:
        raise ValueError(f"mean_impact_intervals: expected one number of sites, got {counts}")


def _units(arrays: Sequence[Array], level: float, resamples: int) -> int:
    _check_level(level)
    counts = {array.shape[-1] if array.ndim else 0 for array in arrays}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(
            f"bootstrap: expected samples over the same units [P] with P >= 1, got {sorted(counts)}"
        )
    if resamples < 1:
        raise ValueError(f"bootstrap: expected resamples >= 1, got {resamples}")
    if any(not np.isfinite(array).all() for array in arrays):
        raise ValueError("bootstrap: expected finite values, got NaN or infinity")
    return counts.pop()


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"bootstrap: expected 0 < level < 1, got {level}")
