# SPDX-License-Identifier: Apache-2.0
"""Tables, intervals and heat maps of a localization, from its scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ...io.run_folder import write_json, write_table
from ...metrics.bootstrap import (
    ConceptScores,
    Interval,
    impact_intervals,
    mean_impact_intervals,
    rank_stability_interval,
)
from ...metrics.impact import (
    Cumulative,
    Stability,
    cumulative,
    functional,
    mean_impact,
    rank_stability,
    ranking,
)
from ...metrics.results import Impacts
from ..config import MODEL

#: The ranking reads both scorers: the mean of their scores.
BOTH = "both"
#: Share of the full effect that the sites to steer at must carry together when patched.
STEERED_SHARE = 0.5


@dataclass(frozen=True)
class Localization:
    """Results of a localization.

    Attributes:
        sites: aliases in network order.
        concepts: concept names.
        scorers: results by scorer, "both" among them.
        windows: the same for windows of consecutive sites; empty without any.
        order: sites by falling mean impact.
        orders: sites by falling impact on each concept.
        functional: sites whose mean impact reaches tau.
        tau: the threshold.
        stability: agreement of the ranking between seeds, None for one seed.
        stability_interval: bootstrap interval of its mean correlation.
        cumulative: effect of each concept's best k sites, mean over concepts; None until it was
            measured.
        cumulative_by_concept: the same of each concept, in its own order.
        scores: the table of all scores.
        model: whose sites these are.
    """

    sites: list[str]
    concepts: list[str]
    scorers: dict[str, Impacts]
    windows: dict[str, Impacts]
    order: list[str]
    orders: dict[str, list[str]]
    functional: list[str]
    tau: float
    stability: Stability | None
    stability_interval: Interval | None
    cumulative: Cumulative | None
    cumulative_by_concept: dict[str, Cumulative]
    scores: pd.DataFrame
    model: str = MODEL

    @property
    def localized(self) -> dict[str, list[str]]:
        """List the sites to steer each concept at: its best ones, until half of its full effect.

        An added vector need not replace the prompt, so less than the 90 % of `cumulative` will do.
        A concept without a measured effect gets the functional sites, or else the best one.
        """
        found = {}
        for name in self.concepts:
            curve = self.cumulative_by_concept.get(name)
            reached = [k for k, e in enumerate(curve.effect) if e >= STEERED_SHARE] if curve else []
            found[name] = (
                list(curve.order[: reached[0]])
                if curve and reached
                else (self.functional or self.order[:1])
            )
        return found

    def impact_table(self) -> pd.DataFrame:
        """Impacts in the columns that `sidechain impact` reads."""
        rows = [
            {
                "model": self.model,
                "metric": scorer,
                "concept": name,
                "block": site,
                "attn": 0,
                "impact": interval.value,
                "low": interval.low,
                "high": interval.high,
            }
            for scorer, result in self.scorers.items()
            for name, row in zip(self.concepts, result.impacts, strict=True)
            for site, interval in zip(self.sites, row, strict=True)
        ]
        return pd.DataFrame(rows)

    def ranking_table(self) -> pd.DataFrame:
        """Sites by falling mean impact, with intervals and every scorer's mean."""
        rows = []
        for site in self.order:
            at = self.sites.index(site)
            both = self.scorers[BOTH].means[at]
            row: dict[str, Any] = {
                "site": site,
                "mean_impact": both.value,
                "low": both.low,
                "high": both.high,
                "functional": site in self.functional,
            }
            for scorer, result in self.scorers.items():
                if scorer != BOTH:
                    row[f"mean_impact_{scorer}"] = result.means[at].value
            rows.append(row)
        return pd.DataFrame(rows)

    def summary(self) -> dict[str, Any]:
        """Summarise the tables, for `summary.json`."""
        return {
            "sites": self.sites,
            "order": self.order,
            "functional": self.functional,
            "tau": self.tau,
            "localized": self.localized,
            "concepts": self.concepts,
            "stability": None
            if self.stability is None or self.stability_interval is None
            else {
                "mean_rho": self.stability.mean,
                "lowest_rho": self.stability.lowest,
                "low": self.stability_interval.low,
                "high": self.stability_interval.high,
            },
            "cumulative": None
            if self.cumulative is None
            else {"effect": self.cumulative.effect, "needed": self.cumulative.needed},
            "cumulative_by_concept": {
                name: {"order": curve.order, "effect": curve.effect, "needed": curve.needed}
                for name, curve in self.cumulative_by_concept.items()
            },
            "windows": {
                name: interval.value
                for result in self.windows.values()
                if result is self.windows[BOTH]
                for name, interval in zip(result.sites, result.means, strict=True)
            },
        }

    def write(self, out: Path) -> None:
        """Write `scores.csv`, `impact.csv`, `ranking.csv` and `summary.json`."""
        write_table(out / "scores.csv", self.scores)
        write_table(out / "impact.csv", self.impact_table())
        write_table(out / "ranking.csv", self.ranking_table())
        write_json(out / "summary.json", self.summary())


def analyse(
    sites: Sequence[str],
    scores: pd.DataFrame,
    *,
    concepts: Sequence[str],
    seeds: Sequence[int],
    tau: float,
    model: str = MODEL,
) -> Localization:
    """Turn scores (columns concept, preset, pair, seed, scorer, score) into a `Localization`.

    The mean of the scorers is that of their scores; where these are not all log-odds, each scorer's
    are first divided by their standard deviation, so that all count alike.
    """
    concepts = list(concepts)
    alike = scores
    if "probability" not in scores:
        spread = scores.groupby("scorer").score.transform(lambda one: one.std(ddof=0) or 1.0)
        alike = scores.assign(score=scores.score / spread)
    averaged = alike.groupby(["concept", "preset", "pair", "seed"], as_index=False).score.mean()
    tables = {name: part for name, part in scores.groupby("scorer")}
    tables[BOTH] = averaged
    scorers = {name: _scorer(part, concepts, list(sites)) for name, part in tables.items()}
    names = [p for p in scores.preset.unique() if "-" in p]
    windows = (
        {name: _scorer(part, concepts, names) for name, part in tables.items()} if names else {}
    )
    means = [interval.value for interval in scorers[BOTH].means]
    order = [sites[index] for index in ranking(means)]
    flags = functional(means, tau)
    stability, interval = _stability(averaged, concepts, list(sites), seeds)
    orders = {
        name: [sites[index] for index in ranking([interval.value for interval in row])]
        for name, row in zip(concepts, scorers[BOTH].impacts, strict=True)
    }
    by_concept = _cumulative(averaged, orders, seeds[0])
    return Localization(
        sites=list(sites),
        concepts=concepts,
        scorers=scorers,
        windows=windows,
        order=order,
        orders=orders,
        functional=[site for site, flag in zip(sites, flags, strict=True) if flag],
        tau=tau,
        stability=stability,
        stability_interval=interval,
        cumulative=by_concept.pop("", None),
        cumulative_by_concept=by_concept,
        scores=scores,
        model=model,
    )


def _scorer(scores: pd.DataFrame, concepts: list[str], presets: list[str]) -> Impacts:
    units = [_units(scores, name, presets) for name in concepts]
    impacts = [impact_intervals(one) for one in units]
    return Impacts(presets, concepts, impacts, mean_impact_intervals(units))


def _units(scores: pd.DataFrame, name: str, presets: list[str]) -> ConceptScores:
    """Scores of a concept per prompt pair, mean over seeds and scorers."""
    table = scores[scores.concept == name].pivot_table(
        index="preset", columns="pair", values="score", aggfunc="mean"
    )
    return ConceptScores(
        site=table.loc[presets].to_numpy(),
        none=table.loc["none"].to_numpy(),
        every=table.loc["all"].to_numpy(),
    )


def _stability(
    scores: pd.DataFrame, concepts: list[str], sites: list[str], seeds: Sequence[int]
) -> tuple[Stability | None, Interval | None]:
    if len(seeds) < 2 or len(sites) < 2:
        return None, None
    runs = [
        [_units(scores[scores.seed == seed], name, sites) for name in concepts] for seed in seeds
    ]
    means = np.stack(
        [
            mean_impact(
                np.stack([[i.value for i in impact_intervals(c, resamples=1)] for c in one])
            )
            for one in runs
        ]
    )
    return rank_stability(means), rank_stability_interval(runs)


def _cumulative(
    scores: pd.DataFrame, orders: dict[str, list[str]], seed: int
) -> dict[str, Cumulative]:
    """Compute the cumulative effect by concept, and of their mean under ""; empty if unmeasured."""
    if "top:1" not in set(scores.preset):
        return {}
    count = len(next(iter(orders.values())))
    growing = ["none", *(f"top:{k}" for k in range(1, count)), "all"]
    part = scores[scores.seed == seed]
    table = part.pivot_table(index="concept", columns="preset", values="score", aggfunc="mean")
    found = {}
    for name, order in orders.items():
        row = table.loc[name, growing].to_numpy()
        if row[-1] > row[0]:
            found[name] = cumulative(order, row, float(row[0]), float(row[-1]))
    if found:
        # all concepts have equal weight: the mean of shares, not the share of the mean
        shares = np.mean([curve.effect for curve in found.values()], axis=0)
        labels = [f"best {k}" for k in range(1, count + 1)]
        found[""] = cumulative(labels, shares, 0.0, 1.0)
    return found
