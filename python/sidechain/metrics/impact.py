# SPDX-License-Identifier: Apache-2.0
"""How much of a concept enters through each site: impact, threshold rule, cumulative effect.

A score s is the mean alignment of outputs with the concept when the site (`site`), no site
(`none`, the corrupted run) or every site (`every`, the clean run) gets the prompt that contains the
concept.

Source: localization of arXiv:2602.11910 (GitHub `luk-st/steer-audio`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from .thresholds import TAU

Array = NDArray[np.float64]

ROUNDING = 1e-9  # a mean of decimal impacts may miss the threshold by less than this


def impact(site: ArrayLike, none: ArrayLike, every: ArrayLike) -> Array:
    """Return max(0, (site - none) / (every - none)), not capped at 1.

    Args:
        site: scores [..., L] with one site patched.
        none: scores [...] of the corrupted run.
        every: scores [...] of the clean run.

    Returns:
        Impacts [..., L]; NaN where the clean run scores no higher than the corrupted one, as there
        is then no effect to share out.
    """
    numerator, denominator = _effect(site, none, every)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = numerator / denominator
    return np.where(denominator > 0, np.maximum(ratio, 0.0), np.nan)


def mean_impact(impacts: ArrayLike) -> Array:
    """Average impacts [C, L] over concepts, [L]; undefined concepts are left out."""
    values = np.asarray(impacts, dtype=np.float64)
    if values.ndim != 2:
        raise ValueError(f"mean_impact: expected impacts [C, L], got {list(values.shape)}")
    defined = ~np.isnan(values)
    counts = defined.sum(axis=0)
    totals = np.where(defined, values, 0.0).sum(axis=0)
    return np.where(counts > 0, totals / np.maximum(counts, 1), np.nan)


def functional(means: ArrayLike, tau: float = TAU) -> NDArray[np.bool_]:
    """Return which mean impacts reach the threshold `tau`; an undefined mean does not."""
    if not np.isfinite(tau):
        raise ValueError(f"functional: expected a finite tau, got {tau}")
    return np.asarray(means, dtype=np.float64) >= tau - ROUNDING


def ranking(means: ArrayLike) -> list[int]:
    """Return indices by falling mean impact; ties keep their order, undefined ones come last."""
    values = np.asarray(means, dtype=np.float64)
    order = np.argsort(-np.where(np.isnan(values), -np.inf, values), kind="stable")
    return [int(index) for index in order]


def windows(sites: Sequence[str], size: int) -> list[tuple[str, ...]]:
    """List all runs of `size` consecutive sites, in order.

    Args:
        sites: site names in the order of the network.
        size: sites per window, 1 <= size <= len(sites).
    """
    if not 1 <= size <= len(sites):
        raise ValueError(f"windows: expected size 1 to {len(sites)} (number of sites), got {size}")
    return [tuple(sites[start : start + size]) for start in range(len(sites) - size + 1)]


@dataclass(frozen=True)
class Cumulative:
    """Effect of the best k sites together, k = 0 .. L.

    Attributes:
        order: sites as they are added [L].
        effect: share of the full effect with the first k sites patched [L + 1].
        share: the share asked for.
        needed: smallest k whose effect reaches `share`; None if none does.
    """

    order: tuple[str, ...]
    effect: tuple[float, ...]
    share: float
    needed: int | None


def cumulative(
    order: Sequence[str], scores: ArrayLike, none: float, every: float, *, share: float = 0.9
) -> Cumulative:
    """Turn scores of growing site sets into a cumulative curve.

    Args:
        order: sites as they were added, best first [L].
        scores: score with the first k of them patched, k = 0 .. L [L + 1].
        none: score of the corrupted run.
        every: score of the clean run.
        share: share of the full effect to look for.
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.shape != (len(order) + 1,):
        raise ValueError(
            f"cumulative: expected scores [L + 1] with L={len(order)} (len(order)), "
            f"got {list(values.shape)}"
        )
    if not every > none:
        raise ValueError(f"cumulative: expected every > none, got every={every}, none={none}")
    effect = (values - none) / (every - none)
    enough = np.flatnonzero(effect >= share - ROUNDING)
    needed = int(enough[0]) if enough.size else None
    return Cumulative(tuple(order), tuple(float(e) for e in effect), share, needed)


@dataclass(frozen=True)
class Stability:
    """Agreement of site rankings between runs (Spearman's rho of every pair of runs).

    Attributes:
        mean: mean rho over pairs of runs.
        lowest: smallest rho.
        pairs: (run, run, rho) of every pair.
    """

    mean: float
    lowest: float
    pairs: tuple[tuple[int, int, float], ...]


def rank_stability(means: ArrayLike) -> Stability:
    """Compare the ranking of sites between runs that differ in seed only.

    Args:
        means: mean impact per run and site [K, L], K >= 2 runs, L >= 2 sites.

    Returns:
        Spearman correlations; NaN for a run whose impacts are all equal.
    """
    values = np.asarray(means, dtype=np.float64)
    if values.ndim != 2 or min(values.shape) < 2:
        raise ValueError(
            f"rank_stability: expected means [K, L] with K, L >= 2, got {list(values.shape)}"
        )
    pairs = tuple(
        (first, second, spearman(values[first], values[second]))
        for first in range(len(values))
        for second in range(first + 1, len(values))
    )
    rhos = [rho for _, _, rho in pairs]
    return Stability(float(np.mean(rhos)), float(np.min(rhos)), pairs)


def spearman(first: ArrayLike, second: ArrayLike) -> float:
    """Return Spearman's rho of two vectors; NaN if either is constant."""
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or a.size < 2:
        raise ValueError(
            "spearman: expected two vectors [L] with L >= 2, "
            f"got {list(a.shape)} and {list(b.shape)}"
        )
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(stats.spearmanr(a, b).statistic)


def _effect(site: ArrayLike, none: ArrayLike, every: ArrayLike) -> tuple[Array, Array]:
    patched, low, high = (np.asarray(v, dtype=np.float64) for v in (site, none, every))
    if low.shape != high.shape or patched.shape[:-1] != low.shape:
        raise ValueError(
            "impact: expected site [..., L], none [...] and every [...], "
            f"got {list(patched.shape)}, {list(low.shape)}, {list(high.shape)}"
        )
    return patched - low[..., None], (high - low)[..., None]
