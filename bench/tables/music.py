# SPDX-License-Identifier: Apache-2.0
"""The studies of the music model: where concepts enter, and how far they can be steered."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from sidechain.metrics import curves

from .files import Results
from .markdown import Section

BY_FEATURES = "sae-"  # folders of steering runs with `--method sae`
FLOOR = 0.8  # share of clips that must keep what steering should leave alone
ARMS = ("localized", "all", "ablated", "random")
SCORERS = ("latent", "mel")
NONE_KEEPS = "none keeps enough"


def section(results: Results) -> Section:
    """Localization, steering by CAA, and steering by dictionary features."""
    found = Section("Studies of the music model")
    folder = results.folder / "music"
    _localization(found, folder / "localization")
    _steering(found, folder / "steering")
    _methods(found, folder / "steering")
    return found


def _localization(found: Section, folder: Path) -> None:
    """Where each concept enters."""
    summary = _summary(folder)
    stability = summary["stability"]
    found.add(
        "Localization of the shipped model (`sidechain localize`, files in "
        "`music/localization/`): 4 prompt pairs, 3 seeds, 12 steps, impact in log-odds, mean of "
        f"both scorers. Ranks agree between seeds: rho {stability['mean_rho']:.2f} "
        f"[{stability['low']:.2f}, {stability['high']:.2f}]. Sites at or above the mean-impact "
        f"threshold of {summary['tau']:.2f}: {', '.join(summary['functional'])}. Share of the full "
        "effect with the best k sites of a concept patched:",
        ("concept", "best sites, in order", "k=1", "k=2", "k=3", "k=4", "90 % at k"),
        (
            (
                name,
                _short(curve["order"][:4]),
                *(f"{value:.2f}" for value in curve["effect"][1:5]),
                str(curve["needed"]),
            )
            for name, curve in summary["cumulative_by_concept"].items()
        ),
    )
    scores = _table(folder / "scores.csv")
    found.lines += [_in_probabilities(scores, summary["sites"], summary["tau"]), ""]


def _in_probabilities(scores: pd.DataFrame, sites: list[str], tau: float) -> str:
    """The same localization read in plain probabilities."""
    table = scores.pivot_table(
        index="concept", columns="preset", values="probability", aggfunc="mean"
    )
    full = table["all"] - table["none"]
    means = table[sites].sub(table["none"], axis=0).div(full, axis=0).clip(lower=0).mean()
    listed = ", ".join(f"{site} {value:.2f}" for site, value in means.items())
    passing = ", ".join(means.index[means >= tau]) or "none"
    return (
        "The score was changed from probability to log-odds after a first look (half-trained "
        "model, 3 concepts, 2 pairs) in which no single site reached the threshold. In "
        f"probabilities this run has mean impacts {listed}; at or above {tau:.2f}: {passing}."
    )


def _steering(found: Section, folder: Path) -> None:
    """The best strength of every arm that keeps enough."""
    rows = []
    for run in sorted(folder.iterdir()):
        if run.name.startswith(BY_FEATURES):
            continue
        table, summary = _table(run / "curves.csv"), _summary(run)
        head = [run.name, str(summary["prompts"]), _short(summary["localized"])]
        for arm, wide in _arms(table):
            best = _best(wide)
            if best is None:
                rows.append([*head, arm, NONE_KEEPS, "", "", ""])
                found.losses.append(f"steering {run.name}, arm {arm}: no strength keeps enough.")
                continue
            pairs = [_pair(wide, "score", 0.0), _pair(wide, "score", best)]
            rows.append([*head, arm, f"{best:g}", *pairs, _pair(wide, "kept", best)])
    found.add(
        "Steering by CAA vectors of 50 prompt pairs (`sidechain steer`, files in "
        "`music/steering/`): the best strength at which both scorers see the instrument (for "
        "instruments: drums) kept in at least 80 % of the clips. Values: latent scorer / mel "
        "scorer. The strength is picked on the same prompts that are reported, so these are best "
        "cases. `fine-` rows are finer grids (and for drums another set of sites) tried after the "
        "first sweep, with partly the same prompts:",
        ("concept", "n", "sites", "arm", "strength", "P before", "P after", "kept"),
        rows,
    )


def _methods(found: Section, folder: Path) -> None:
    """Mean differences beside dictionary features, at the same sites, prompts and noise."""
    rows = []
    for run in sorted(folder.glob(f"{BY_FEATURES}*")):
        concept = run.name.removeprefix(BY_FEATURES)
        files = {"CAA": run.parent / concept, "features": run}
        wide = {n: dict(_arms(_table(f / "curves.csv")))["localized"] for n, f in files.items()}
        areas = {name: " / ".join(f"{a:.2f}" for a in _areas(wide, name)) for name in wide}
        sites = _short(_summary(run)["localized"])
        for name, part in wide.items():
            best = _best(part)
            figures = (
                ["", NONE_KEEPS, ""]
                if best is None
                else [f"{best:g}", _pair(part, "score", best), _pair(part, "kept", best)]
            )
            rows.append([concept, sites, name, *figures, areas[name]])
    if rows:
        found.add(
            "Steering by dictionary features (`--method sae`: the 20 best of a step by TADA's "
            "score, weighted by their natural difference) beside CAA, 10 prompts, 50 pairs, the "
            "same sites and noise. Best strength at which both scorers see enough kept, P there, "
            "and the area under P over distance up to the smaller of both methods' largest "
            "distances; latent scorer / mel scorer. The strength is picked on the prompts "
            "reported:",
            ("concept", "sites", "method", "strength", "P", "kept", "AUC"),
            rows,
        )


def _summary(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "summary.json").read_text(encoding="utf-8")))


def _table(path: Path) -> pd.DataFrame:
    """A table of a study; the column of the scorers was once called "judge"."""
    return pd.read_csv(path).rename(columns={"judge": "scorer"})


def _arms(table: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Each arm that was run, as strengths x (figure, scorer)."""
    for arm in ARMS:
        part = table[table.arm == arm]
        if not part.empty:
            yield arm, part.pivot(index="strength", columns="scorer")


def _best(wide: pd.DataFrame) -> float | None:
    """The strength with the highest score among those that keep enough."""
    allowed = wide[(wide.kept.min(axis=1) >= FLOOR) & (wide.index != 0)]
    return None if allowed.empty else float(allowed.score.mean(axis=1).idxmax())


def _pair(wide: pd.DataFrame, column: str, strength: float) -> str:
    return " / ".join(f"{wide.loc[strength, (column, scorer)]:.2f}" for scorer in SCORERS)


def _areas(wide: dict[str, pd.DataFrame], name: str) -> list[float]:
    """Area under the score of one method, up to the distance that all methods reach."""
    found = []
    for scorer in SCORERS:
        sweeps = {n: (p.distance[scorer].to_numpy(), p.index.to_numpy()) for n, p in wide.items()}
        limit = curves.cutoff(sweeps.values(), 1)
        distance, strength = sweeps[name]
        score = wide[name].score[scorer].to_numpy()
        found.append(float(curves.score(distance, score, strength, {1: limit}).auc))
    return found


def _short(sites: list[str]) -> str:
    return ", ".join(site.removeprefix("cross:") for site in sites)
