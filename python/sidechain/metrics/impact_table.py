# SPDX-License-Identifier: Apache-2.0
"""Mean impact for a table of impacts per concept and block."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sidechain.metrics.impact import functional, mean_impact, ranking
from sidechain.metrics.tables import Row, read_table
from sidechain.metrics.thresholds import TAU

COLUMNS = ("model", "block", "attn", "mean_impact", "functional")


def read_impacts(path: str | Path) -> list[Row]:
    """Read a table with columns model,metric,concept,block,attn,impact (others are ignored)."""
    return read_table(
        path,
        text=("model", "metric", "concept", "block", "attn"),
        blank_numbers=("impact",),
        name="impact",
    )


def mean_impacts(
    rows: Sequence[Row], *, tau: float = TAU, metric: str | None = None
) -> list[dict[str, object]]:
    """Average over concepts per model, block and attn, and apply the threshold rule.

    Args:
        rows: model, metric, concept, block, attn, impact each; NaN impacts are left out.
        tau: a site is functional if its mean impact reaches this.
        metric: use the rows of this metric only (needed if a concept has several).

    Returns:
        One dict per site with keys `COLUMNS`: models in order of appearance, largest impact first.

    Raises:
        ValueError: a concept occurs twice for a site, or `metric` does not occur.
    """
    if not math.isfinite(tau):
        raise ValueError(f"impact: expected a finite tau, got {tau}")
    if metric is not None:
        known = list(dict.fromkeys(str(row["metric"]) for row in rows))
        if metric not in known:
            raise ValueError(f"impact: expected metric {' | '.join(known)}, got {metric!r}")
        rows = [row for row in rows if row["metric"] == metric]
    models: dict[str, dict[tuple[str, str], dict[str, float]]] = {}
    for row in rows:
        sites = models.setdefault(str(row["model"]), {})
        concepts = sites.setdefault((str(row["block"]), str(row["attn"])), {})
        concept = str(row["concept"])
        if concept in concepts:
            raise ValueError(
                f"impact: expected one row per model, block, attn and concept, got {concept} twice "
                f"for {row['model']} {row['block']} {row['attn']} (choose one with --metric)"
            )
        concepts[concept] = float(row["impact"])
    return [line for model, sites in models.items() for line in _rank(model, sites, tau)]


def incomplete_sites(rows: Sequence[Row], metric: str | None = None) -> list[str]:
    """Name sites that lack a concept which other sites of their model have."""
    seen: dict[str, dict[str, set[str]]] = {}
    for row in rows:
        if metric is None or row["metric"] == metric:
            site = f"{row['block']} {row['attn']}"
            sites = seen.setdefault(str(row["model"]), {})
            sites.setdefault(site, set()).add(str(row["concept"]))
    notes = []
    for model, sites in seen.items():
        every = set().union(*sites.values())
        notes += [
            f"{model} {site}: no row for {', '.join(sorted(every - own))}"
            for site, own in sites.items()
            if own != every
        ]
    return notes


def _rank(
    model: str, sites: dict[tuple[str, str], dict[str, float]], tau: float
) -> list[dict[str, object]]:
    concepts = list(dict.fromkeys(name for own in sites.values() for name in own))
    table = np.array([[own.get(name, math.nan) for own in sites.values()] for name in concepts])
    means = mean_impact(table)
    reached = functional(means, tau)
    keys = list(sites)
    return [
        {
            "model": model,
            "block": keys[index][0],
            "attn": keys[index][1],
            "mean_impact": float(means[index]),
            "functional": bool(reached[index]),
        }
        for index in ranking(means)
    ]
