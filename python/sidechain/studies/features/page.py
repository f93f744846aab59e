# SPDX-License-Identifier: Apache-2.0
"""The page of `sidechain sae score`: how good dictionaries are, and features to hear."""

from __future__ import annotations

from pathlib import Path

from ...report import feature_figures
from ...report.data import (
    Block,
    Bullets,
    Commands,
    Facts,
    Page,
    Picture,
    Section,
    Strip,
    Table,
    Text,
)
from ...report.html import picture, write_page
from ..page import listed
from .health import health_table
from .run import DictionaryStudy, FeatureFound, listen

#: Features shown with clips for each concept: the best ones over all sites.
SHOWN = 3


def write(study: DictionaryStudy, path: Path) -> Path:
    """Write the page and return its path."""
    return write_page(page(study), path)


def page(study: DictionaryStudy) -> Page:
    """Lay out everything that was found; generates the clips."""
    shown, config = best_features(study), study.config
    run = {
        "captions": config.prompts,
        "prompt pairs a concept": config.pairs,
        "steps of the sampler": config.steps,
        "guidance scale": config.guidance,
        "seed": config.seed,
    }
    command = f"sidechain sae score --concepts {','.join(config.concepts)}"
    tables: list[Block] = [_health(study), health_table(study.health_table()), feature_table(study)]
    return Page(
        title="What the dictionaries of a model hold",
        summary=(
            "Sparse dictionaries of what attention sites put out, measured on captions they were "
            f"not trained on, and the features that speak for {listed(config.concepts)}."
        ),
        findings=_findings(study, shown),
        sections=[
            Section("method", "What was done", [Text(_method(study))]),
            Section("dictionaries", "Dictionaries", tables),
            Section("features", "Features to hear", _strips(study, shown)),
            Section("facts", "Run", [Facts({"Run": run})]),
            Section("limits", "Limits", [Bullets(_LIMITS)]),
            Section("reproduce", "Reproduce", [Commands([command])]),
        ],
    )


def _method(study: DictionaryStudy) -> list[str]:
    config = study.config
    return [
        f"{config.prompts} captions that no dictionary was trained on were generated once and "
        "read at all sites. FVU is the share of the variance that the reconstruction leaves, "
        "all steps weighed alike.",
        f"Concepts: {config.pairs} prompt pairs with and without each concept, all sites read "
        f"in one generation. Score {config.score}, mean over steps; the table of scores "
        "(scores.csv) has the best feature of every method and step.",
    ]


_LIMITS = [
    "A feature that scores high is active with the concept; that it causes the concept is shown "
    "by steering with it (`sidechain steer --method sae`), not here.",
    "The shares of active features are those of these captions; rarer features may fire on others.",
]


def _health(study: DictionaryStudy) -> Picture:
    rows = study.health
    dead = "; ".join(f"{site} {int((one.density == 0).sum())}" for site, one in rows.items())
    return picture(
        lambda mode, width: feature_figures.dictionary_health(rows, theme=mode, width=width),
        f"Unexplained variance of {len(rows)} dictionaries by step, and how often features fire.",
        "Left: share of a step's variance that the reconstruction leaves. Right: features by the "
        f"share of tokens in which they are active. Never active here: {dead}.",
    )


def _strips(study: DictionaryStudy, shown: list[FeatureFound]) -> list[Block]:
    lead = Text(
        [
            "Held-out clips in which a feature is most active, one per prompt. Under each "
            "spectrogram: its activation along the clip at that step, one scale for the row; the "
            "line marks the moment. Each row scrolls sideways."
        ],
        soft=True,
    )
    strips = [
        Strip(
            f"{one.site}, feature {one.feature}",
            f"{one.concept}; active in {one.rate[0]:.0%} of the tokens with it, {one.rate[1]:.0%} "
            "without",
            clips,
        )
        for one, clips in zip(shown, listen(study, shown), strict=True)
    ]
    return [lead, *strips] if strips else []


def best_features(study: DictionaryStudy) -> list[FeatureFound]:
    """The best features of each concept over all sites, without those that fire nowhere here."""
    chosen = []
    for name in study.config.concepts:
        group = [f for f in study.found if f.concept == name and f.moments]
        chosen += sorted(group, key=lambda f: -f.score)[:SHOWN]
    return chosen


def _findings(study: DictionaryStudy, shown: list[FeatureFound]) -> list[str]:
    table = study.health_table()
    rows = [
        f"FVU {table.fvu.min():.3f} to {table.fvu.max():.3f} over {len(table)} sites, "
        f"{table.dead.min():.1%} to {table.dead.max():.1%} of the features never active on "
        f"{int(table.rows.max())} held-out tokens."
    ]
    for name in study.config.concepts:
        best = next((f for f in shown if f.concept == name), None)
        if best is not None:
            rows.append(
                f"{name}: feature {best.feature} of {best.site} is active in {best.rate[0]:.0%} of "
                f"the tokens with it and {best.rate[1]:.0%} without."
            )
    return rows


def feature_table(study: DictionaryStudy) -> Table:
    """The features that score best."""
    rows = [
        [
            f.concept,
            f.site,
            f.feature,
            f.score,
            f.step,
            f.kept[0],
            f.kept[1],
            f"{f.rate[0]:.1%}",
            f"{f.rate[1]:.1%}",
        ]
        for f in study.found
    ]
    columns = [
        "concept", "site", "feature", f"score ({study.config.score})", "best step",
        "mean with", "mean without", "active with", "active without",
    ]  # fmt: skip
    return Table("Features that stand for concepts", columns, rows)
