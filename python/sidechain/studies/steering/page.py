# SPDX-License-Identifier: Apache-2.0
"""The page of `sidechain steer`: effect against preservation for every arm, and clips to hear."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from ...metrics.bootstrap import proportion_interval
from ...metrics.results import KEPT_FLOOR, ArmCurve
from ...report import figures
from ...report.data import Block, Clip, Meter, Page, Picture, Section, Strip, Table, Text
from ...report.html import picture, write_page
from ...zoo.music.concepts import concept
from .. import page as shared
from ..page import PAGE, RunRead, counted, listed, scorer_label
from .analyse import PROMPT, Steering, Target, analyse, clip_name, kept_attribute, measure_of
from .config import SteeringConfig

_FILES = {
    "scores.csv": "area, smoothness and best point of every arm and scorer",
    "curves.csv": "score, distance and preservation of every arm and strength, with intervals",
    "readings.csv": "every clip as every scorer reads it",
    "summary.json": "the same in short, and the best strength",
    "vector.safetensors": "the steering vector",
}


def write(folder: Path) -> Path:
    """Write `report.html` into the run folder, from the files in it; return its path.

    Raises:
        InputError: no sweep there, or nothing measured yet.
        OSError: a file cannot be read or written.
    """
    run, found = read(folder)
    return write_page(page(run, found), folder / PAGE)


def read(folder: Path) -> tuple[RunRead, Steering]:
    """Read a run back: its files and what it found."""
    run = shared.read_run(folder, "steer", "readings.csv", SteeringConfig)
    if run.finished:
        sites = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["localized"]
    else:
        sites = (run.config.get("sites") or "the localized sites").split(",")
    name = str(run.table.concept[0])
    texts = f"{PROMPT}_kept" in run.table
    wanted = Target(name, str(run.config.get("scored_text") or name)) if texts else concept(name)
    return run, analyse(run.table, wanted, sites)


def page(run: RunRead, found: Steering) -> Page:
    """Lay out what a sweep found."""
    config, name = run.config, found.concept.name
    strengths = sorted(set(found.readings.strength))
    return Page(
        title=f"How far {run.model} can be pushed towards {name}",
        summary=(
            f"How much more {name} comes out of {run.model} when a vector is added at "
            f"{listed(found.localized)}, and what else changes? Asked with "
            f"{counted(found.prompts, 'prompt')}, strengths {strengths[0]:g} to {strengths[-1]:g}, "
            f"{counted(config['steps'], 'sampler step')}, guidance {config['guidance']:g}, seed "
            f"{config['seed']}."
        ),
        findings=[*shared.unfinished(run), *findings(found)],
        sections=[
            Section("listen", "Listen", sounds(run.folder, found)),
            Section("steering", "Effect and preservation", blocks(found)),
            Section("kept", "What stays", _kept(found)),
            Section("method", "What was done", [Text(_method(config, found))]),
            *shared.closing(run, "steer", _FILES),
        ],
    )


def findings(found: Steering) -> list[str]:
    """Write what came out: the best strength of the localized sites, and the random direction."""
    name, kept = found.concept.name, kept_attribute(found.concept)
    strength = found.operating_strength()
    if strength is None:
        return [
            f"{name}: no strength at the localized sites keeps the {kept} in {KEPT_FLOOR:.0%} of "
            "the clips."
        ]
    parts = []
    for scorer, arms in found.arms.items():
        curve = arms["localized"]
        at, zero = curve.strength.index(strength), curve.strength.index(0.0)
        parts.append(
            f"{curve.score[zero].value:.2f} to {curve.score[at].value:.2f} "
            f"({scorer_label(scorer)}, {kept} kept {curve.kept[at].value:.0%})"
        )
    rows = [
        f"Steering {name} at {listed(found.localized)} with strength {strength:g} moves "
        f"{measure_of(found.concept)} from {'; '.join(parts)}."
    ]
    control = [arms["random"] for arms in found.arms.values() if "random" in arms]
    if control:
        top = max(point.value for curve in control for point in curve.score)
        rows.append(
            f"A random direction of the same length at the same sites reaches {top:.2f} at most."
        )
    return rows


def blocks(found: Steering) -> list[Block]:
    """Curves of every arm and scorer, the arms compared, and the values behind the curves."""
    if not any(found.arms.values()):
        return [Text(["Only the unsteered clips were generated."])]
    tables = [_curve_table(found, scorer, arms) for scorer, arms in found.arms.items()]
    return [_curves(found), arm_table(found), *tables]


def _curves(found: Steering) -> Picture:
    name, kept = found.concept.name, kept_attribute(found.concept)
    cutoffs = {scorer: sides[1] for scorer, sides in found.cutoff.items() if 1 in sides}
    level = next(iter(next(iter(found.arms.values())).values())).score[0].level
    upright = " Dashed upright: cut-off of the area." if cutoffs else ""
    words = " ".join(
        f"{scorer_label(scorer)}, {figures.ARM_LABELS.get(arm, arm)}: "
        + ("never kept enough." if best is None else f"up to {curve.score[best].value:.2f}.")
        for scorer, arms in found.arms.items()
        for arm, curve in arms.items()
        for best in [curve.best_point()]
    )
    return picture(
        lambda mode, width: figures.tradeoff(
            found.arms,
            concept=name,
            kept=kept,
            score=measure_of(found.concept),
            cutoffs=cutoffs,
            theme=mode,
            width=width,
        ),
        f"{measure_of(found.concept)} over distance and strength. {words}",
        f"Steering towards {name}. Distance: between features of the scorer, to the clip of "
        f"strength 0. Bands: {level:.0%} intervals over {counted(found.prompts, 'prompt')}. Dashed "
        f"level: {kept} kept {KEPT_FLOOR:.2f}.{upright}",
    )


def arm_table(found: Steering) -> Table:
    """The best point of every arm that keeps enough, area and smoothness; baselines among them."""
    rows: list[list[object]] = []
    for scorer, arms in found.arms.items():
        for arm, curve in arms.items():
            best, zero = curve.best_point(), curve.strength.index(0.0)
            at: list[object] = ["\u2013", math.nan, math.nan, math.nan]
            if best is not None:
                strength = f"{curve.strength[best]:+g}".replace("-", "\u2212")
                at = [strength, curve.score[best], curve.kept[best], curve.distance[best]]
            scores = [_three(value) for value in (curve.auc, curve.smoothness)]
            label = figures.ARM_LABELS.get(arm, arm)
            rows.append([label, scorer, curve.score[zero], *at, *scores])
    columns = [
        "arm", "scorer", "P unsteered", "best strength", "P there", "kept there", "distance there",
        "AUC ↑", "smoothness ↓",
    ]  # fmt: skip
    kept = kept_attribute(found.concept)
    caption = f"best strength: the largest P that keeps the {kept} in {KEPT_FLOOR:.0%} of the clips"
    return Table(f"Arms compared, {found.concept.name}", columns, rows, caption)


def _three(value: float) -> object:
    """Three decimals, and no negative zero."""
    return value if math.isnan(value) else f"{round(value, 3) + 0.0:.3f}"


def _curve_table(found: Steering, scorer: str, arms: Mapping[str, ArmCurve]) -> Table:
    rows = [
        [figures.ARM_LABELS.get(arm, arm), f"{strength:g}".replace("-", "\u2212"), *values]
        for arm, one in arms.items()
        for strength, *values in zip(one.strength, one.score, one.distance, one.kept, strict=True)
    ]
    columns = [
        "arm", "strength", measure_of(found.concept), "distance",
        f"{kept_attribute(found.concept)} kept",
    ]  # fmt: skip
    title = f"Curves of {found.concept.name}, {scorer_label(scorer)}"
    return Table(title, columns, rows, f"n = {counted(found.prompts, 'prompt')}", folded=True)


def _kept(found: Steering) -> list[Block]:
    """Every other attribute at the strength that each arm does best at, both scorers pooled."""
    rows = found.readings
    columns = [name for name in rows if str(name).endswith("_kept")]
    strength = found.operating_strength() or float(rows.strength.max())
    table = []
    for arm in [name for name in rows.arm.unique() if name != "none"]:
        for scorer in rows.scorer.unique():
            part = rows[(rows.arm == arm) & (rows.scorer == scorer) & (rows.strength == strength)]
            if len(part):
                shares = [proportion_interval(int(part[name].sum()), len(part)) for name in columns]
                table.append([figures.ARM_LABELS.get(arm, arm), scorer, *shares])
    if not table:
        return []
    names = [str(name).removesuffix("_kept") for name in columns]
    caption = f"share of clips whose most probable class stays, at strength {strength:g}"
    return [Table("Attributes kept", ["arm", "scorer", *names], table, caption)]


def _method(config: Mapping[str, Any], found: Steering) -> list[str]:
    made = "the given vector" if config.get("vector") else f"the vector ({config['method']})"
    return [
        f"{made.capitalize()} times the strength is added to the output of each site, in guidance "
        f"mode {config['branches']}. Arms: the localized sites ({listed(found.localized)}), all "
        "sites, all but the localized ones, and a random direction of the same length at the "
        "localized sites. All strengths and arms of a prompt run in one batch from the same noise; "
        "strength 0 is the plain model.",
        _measures(config, found),
    ]


def _measures(config: Mapping[str, Any], found: Steering) -> str:
    """Say what score, distance and preservation are."""
    far = config.get("distance", "scorer")
    area = (
        "AUC is the area of the gain over the distance up to the cut-off, smoothness the "
        "unevenness of the climb."
    )
    if isinstance(found.concept, Target):
        return (
            f"{measure_of(found.concept)} is what a scorer says of a sample and the text "
            f"“{found.concept.text}”; a prompt counts as kept where it stays the closest of all "
            f"prompts of the run. Distance: {'features of the scorer' if far == 'scorer' else far}."
            f" {area}"
        )
    return (
        f"P({found.concept.name}) is the probability that a classifier gives the concept; the "
        f"{kept_attribute(found.concept)} counts as kept where its most probable class stays. "
        f"{area}"
    )


def sounds(folder: Path, found: Steering) -> list[Block]:
    """The first prompt over the strengths of every arm that has clips in the run folder."""
    rows = found.readings[found.readings.prompt == 0]
    strips = []
    for arm in [name for name in rows.arm.unique() if name != "none"]:
        clips = [
            Clip(_strength(strength), *read, _meters(part, found), _note(part), base=not strength)
            for strength, part in rows[rows.arm.isin(["none", arm])].groupby("strength")
            for read in [shared.sound(folder / clip_name(0, str(part.arm.iloc[0]), strength))]
            if read is not None
        ]
        if len(clips) > 1:
            label = figures.ARM_LABELS.get(arm, arm)
            title = f"{found.concept.name}, {label}"
            strips.append(Strip(title, f"“{rows.text.iloc[0]}”", clips, _CAPTION))
    return list(strips)


_CAPTION = (
    "The same prompt and noise; only the steering differs. Log-mel spectrograms: time to the "
    "right, 30 Hz to 8 kHz upwards, one colour scale for the row."
)


def _strength(value: float) -> str:
    return f"{value:+g}".replace("-", "\u2212") if value else "unsteered"


def _meters(part: pd.DataFrame, found: Steering) -> list[Meter]:
    kept = kept_attribute(found.concept)
    return [
        *(
            Meter(f"P({found.concept.name}), {scorer}", float(score))
            for scorer, score in zip(part.scorer, part.score, strict=True)
            if not isinstance(found.concept, Target)  # a bar is a share, a cosine is none
        ),
        Meter(f"{kept} kept, share of scorers", float(part[f"{kept}_kept"].mean()), effect=False),
    ]


def _note(part: pd.DataFrame) -> str:
    far = ", ".join(
        f"{scorer} {distance:.2f}"
        for scorer, distance in zip(part.scorer, part.distance, strict=True)
    )
    return f"distance: {far}"
