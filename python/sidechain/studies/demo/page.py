# SPDX-License-Identifier: Apache-2.0
"""The report of `sidechain demo`: what its studies found, laid out as `ReportData`."""

from __future__ import annotations

from pathlib import Path

from ...report.data import (
    Arm,
    Clip,
    CumulativeCurve,
    ImpactMap,
    ReportData,
    Sweep,
    Table,
    Tradeoff,
)
from ...report.html import write_report
from .. import steering as st
from ..localization import Localization
from .run import DemoResult, SweepClips

#: Names before the word "judge"; "both" is the mean of the two.
_JUDGES = {"both": "average", "latent": "latent", "mel": "mel"}


def write(result: DemoResult, path: Path) -> Path:
    """Write the report and return its path."""
    return write_report(report_data(result), path)


def report_data(result: DemoResult) -> ReportData:
    """Everything the report of a demo shows."""
    config = result.config
    return ReportData(
        title="Where a music model keeps its concepts, and how to turn them up",
        summary=(
            "A small text-to-music diffusion transformer with eight cross-attentions, trained for "
            "this package, was searched for the sites through which each concept enters. Then "
            f"{_listed(config.steered)} were pushed up at those sites, at all sites, at the other "
            "sites and along a random direction of the same size."
        ),
        findings=_findings(result),
        method=_method(result),
        impacts=impact_maps(result.localization),
        cumulative=cumulative_curves(result.localization),
        localization_tables=[ranking_table(result.localization)],
        tradeoffs=[one for found in result.steering.values() for one in tradeoffs(found)],
        sweeps=[_sweep(clips) for clips in result.clips],
        model=result.model,
        run={
            **{f"seconds, {name}": round(value, 1) for name, value in result.seconds.items()},
            "steps of the sampler": config.steps,
            "guidance scale": config.guidance,
            "seed": config.seed,
        },
        reproduce=[f"sidechain demo --seed {config.seed}"],
        limits=_limits(),
    )


def _findings(result: DemoResult) -> list[str]:
    found = result.localization
    rows = []
    if found.functional:
        rows.append(
            f"The mean impact of {_listed(found.functional)} reaches the threshold of "
            f"{found.tau:.2f}; the strongest is {found.order[0]}."
        )
    else:
        rows.append(
            f"No single site reaches the mean-impact threshold of {found.tau:.2f}: on a model this "
            "small the concepts are spread, see the cumulative curve."
        )
    if found.cumulative is not None and found.cumulative.needed:
        rows.append(
            f"The best {found.cumulative.needed} of {len(found.sites)} sites of a concept together "
            f"carry {found.cumulative.share:.0%} of its full effect (mean over concepts)."
        )
    for name, steering in result.steering.items():
        rows.append(_steering_finding(name, steering))
    return rows


def _steering_finding(name: str, steering: st.Steering) -> str:
    strength = steering.operating_strength()
    kept = st.kept_attribute(steering.concept)
    if strength is None:
        return f"{name}: no strength keeps the {kept} in 80 % of the clips."
    parts = []
    for judge, arms in steering.arms.items():
        curve = arms["localized"]
        at, zero = curve.strength.index(strength), curve.strength.index(0.0)
        parts.append(
            f"{curve.score[zero].value:.2f} to {curve.score[at].value:.2f} "
            f"({_JUDGES[judge]} judge, {kept} kept {curve.kept[at].value:.0%})"
        )
    return (
        f"Steering {name} at {_listed(steering.localized)} with strength {strength:g} moves "
        f"P({name}) from {'; '.join(parts)}."
    )


def _method(result: DemoResult) -> list[str]:
    config = result.config
    return [
        f"Localization: {config.pairs} prompt pairs per concept. The run starts from the prompt "
        "without the concept; one site at a time sees the prompt with it. Impact is the share of "
        "the full effect that comes through, in log-odds of the judges (mean of both). All presets "
        "of a pair run in one batch.",
        f"Steering: the vector is the mean difference of a site's output over "
        f"{config.vector_pairs} other prompt pairs, per step; strength 1 adds exactly that "
        "difference to the conditional pass. All strengths and arms of a prompt run in one batch.",
        "Two classifiers that share neither architecture nor training clips read every result. "
        "Bars and bands are 95 % intervals over prompts.",
    ]


def _limits() -> list[str]:
    return [
        "The model knows eight instruments, five seconds and about sixty words.",
        "The judges learned from the same renderer as the model; `sidechain.zoo.music_tagger` is "
        "an outside witness.",
        "Few prompts: read intervals, not points. `sidechain localize` and `sidechain steer` run "
        "the same studies at full size.",
    ]


def impact_maps(found: Localization) -> list[ImpactMap]:
    """Heat maps of single sites as both judges and each judge read them, then of windows."""
    maps = [
        ImpactMap(
            found.sites, found.concepts, result.impacts, result.means, _JUDGES[judge], found.tau
        )
        for judge, result in sorted(found.judges.items())
        if judge == "both"
    ]
    for judge, result in found.windows.items():
        if judge == "both":
            maps.append(
                ImpactMap(
                    found.window_names,
                    found.concepts,
                    result.impacts,
                    result.means,
                    _JUDGES[judge],
                    found.tau,
                    title="Windows of consecutive sites",
                )
            )
    return maps


def cumulative_curves(found: Localization) -> list[CumulativeCurve]:
    """The mean curve and that of every concept."""
    if found.cumulative is None:
        return []
    curves = {"mean": found.cumulative, **found.cumulative_by_concept}
    return [CumulativeCurve(name, _JUDGES["both"], curve) for name, curve in curves.items()]


def ranking_table(found: Localization) -> Table:
    """Sites by falling impact, one column a judge."""
    table = found.ranking_table()
    judges = [name for name in found.judges if name != "both"]
    rows = [
        [
            row.site,
            found.judges["both"].means[found.sites.index(str(row.site))],
            *(found.judges[judge].means[found.sites.index(str(row.site))] for judge in judges),
            "yes" if row.functional else "no",
        ]
        for row in table.itertuples()
    ]
    caption = "Mean impact over concepts with 95 % intervals."
    if found.stability is not None and found.stability_interval is not None:
        caption += (
            f" Rank correlation between seeds: {found.stability_interval}, "
            f"lowest {found.stability.lowest:.2f}."
        )
    return Table(
        "Ranking",
        ["site", "both judges", *(f"{_JUDGES[j]} judge" for j in judges), "functional"],
        rows,
        caption,
    )


def tradeoffs(found: st.Steering) -> list[Tradeoff]:
    """Curves of one sweep, one for each judge."""
    name = found.concept.name
    return [
        Tradeoff(
            concept=name,
            judge=_JUDGES[judge],
            arms=[
                Arm(
                    arm,
                    curve.strength,
                    curve.score,
                    curve.distance,
                    curve.kept,
                    curve.auc,
                    curve.smoothness,
                )
                for arm, curve in arms.items()
            ],
            alignment_label=f"P({name})",
            kept_label=f"{st.kept_attribute(found.concept)} kept",
            cutoff=found.cutoff[judge].get(1),
            prompts=found.prompts,
        )
        for judge, arms in found.arms.items()
    ]


def _sweep(clips: SweepClips) -> Sweep:
    return Sweep(
        concept=clips.concept,
        prompt=clips.prompt,
        arm="localized",
        seed=clips.seed,
        clips=[
            Clip(
                strength=strength,
                audio=clips.audio[index],
                mel=clips.mels[index].numpy(),
                probabilities=clips.probabilities[index],
                kept=clips.kept[index],
            )
            for index, strength in enumerate(clips.strengths)
        ],
    )


def _listed(names: list[str] | tuple[str, ...]) -> str:
    names = list(names)
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
