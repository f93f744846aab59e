# SPDX-License-Identifier: Apache-2.0
"""The report of `sidechain sae score`: how good dictionaries are, and features to hear."""

from __future__ import annotations

from pathlib import Path

from ...report.data import DictionaryHealth, FeatureCard, FeatureClip, ReportData, Table
from ...report.html import write_report
from .run import DictionaryStudy, FeatureFound, HeardMoment, listen

#: Features shown with clips for each concept: the best ones over all sites.
SHOWN = 3


def write(study: DictionaryStudy, path: Path) -> Path:
    """Write the report and return its path."""
    return write_report(report_data(study), path)


def report_data(study: DictionaryStudy) -> ReportData:
    """Everything the report shows; generates the clips."""
    shown = best_features(study)
    heard = listen(study, shown)
    config = study.config
    return ReportData(
        title="What the dictionaries of a model hold",
        summary=(
            "Sparse dictionaries of what attention sites put out, measured on captions they were "
            f"not trained on, and the features that speak for {', '.join(config.concepts)}."
        ),
        findings=_findings(study, shown),
        method=[
            f"{config.prompts} captions that no dictionary was trained on were generated once and "
            "read at all sites. FVU is the share of the variance that the reconstruction leaves, "
            "all steps weighed alike.",
            f"Concepts: {config.pairs} prompt pairs with and without each concept, all sites read "
            f"in one generation. Score {config.score}, mean over steps; the table of scores "
            "(scores.csv) has the best feature of every method and step.",
        ],
        dictionaries=[
            DictionaryHealth(
                site,
                health.steps.tolist(),
                [float(v) for v in health.step_fvu],
                [float(v) for v in health.density],
            )
            for site, health in study.health.items()
        ],
        dictionary_tables=[health_table(study), feature_table(study)],
        features=[_card(one, clips) for one, clips in zip(shown, heard, strict=True)],
        run={
            "captions": config.prompts,
            "prompt pairs a concept": config.pairs,
            "steps of the sampler": config.steps,
            "guidance scale": config.guidance,
            "seed": config.seed,
        },
        reproduce=[f"sidechain sae score --concepts {','.join(config.concepts)}"],
        limits=[
            "A feature that scores high is active with the concept; that it causes the concept "
            "is shown by steering with it (`sidechain steer --method sae`), not here.",
            "The shares of active features are those of these captions; rarer features may fire on "
            "others.",
        ],
    )


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


def health_table(study: DictionaryStudy) -> Table:
    """Figures of every site."""
    rows = [
        [
            row.site,
            f"{row.architecture}, k={row.k}" if row.k else row.architecture,
            row.features,
            f"{row.fvu:.4f}",
            f"{row.worst_step_fvu:.4f}",
            f"{row.raw_fvu:.4f}",
            f"{row.l0:.1f}",
            f"{row.dead:.1%}",
        ]
        for row in study.health_table().itertuples()
    ]
    columns = ["site", "kind", "features", "FVU", "worst step", "raw FVU", "L0", "dead"]
    return Table("Held-out figures", columns, rows)


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


def _card(one: FeatureFound, heard: list[HeardMoment]) -> FeatureCard:
    return FeatureCard(
        concept=one.concept,
        name=f"{one.site}, feature {one.feature}",
        facts=f"active in {one.rate[0]:.0%} of the tokens with it, {one.rate[1]:.0%} without",
        clips=[_clip(moment) for moment in heard],
    )


def _clip(heard: HeardMoment) -> FeatureClip:
    # Token 0 is the global token that the denoiser puts before the clip.
    along, token = heard.trace[1:], heard.moment.token
    return FeatureClip(
        prompt=heard.text,
        step=heard.moment.step,
        value=heard.moment.value,
        place=None if token == 0 else (token - 0.5) / max(1, len(along)),
        trace=along,
        audio=heard.audio,
        mel=heard.mel.numpy(),
    )
