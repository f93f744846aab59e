# SPDX-License-Identifier: Apache-2.0
"""One self-contained HTML page per study: figures, tables and playable audio, no outside files."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from matplotlib.figure import Figure

from sidechain._version import __version__
from sidechain.io.atomic import write_atomic
from sidechain.metrics.bootstrap import Interval
from sidechain.metrics.impact import functional, ranking
from sidechain.report import feature_figures as dictionary_figures
from sidechain.report import figures
from sidechain.report.data import Arm, FeatureCard, ImpactMap, ReportData, Sweep, Table, Tradeoff
from sidechain.report.media import (
    audio_bytes,
    data_uri,
    spectrogram_png,
    svg,
)
from sidechain.report.theme import Mode, Width, darkened

NARROW = "(max-width: 640px)"
DARK = "(prefers-color-scheme: dark)"
WIDTHS: tuple[Width, ...] = ("wide", "narrow")
VARIANTS: tuple[tuple[Mode, Width, str], ...] = (
    ("dark", "narrow", f"{NARROW} and {DARK}"),
    ("light", "narrow", NARROW),
    ("dark", "wide", DARK),
    ("light", "wide", ""),
)


@dataclass(frozen=True)
class Picture:
    """One figure in all variants: (media query, data URI, pixels wide, pixels high)."""

    sources: Sequence[tuple[str, str, int, int]]
    alt: str
    caption: str


def write_report(data: ReportData, path: str | Path, *, audio: str = "flac") -> Path:
    """Render a report and write it as one file, whole or not at all.

    Args:
        data: what to show.
        path: the HTML file; its folder is made if need be.
        audio: "flac" or "wav".

    Returns:
        The path.
    """
    return write_atomic(path, render(data, audio=audio).encode(), parents=True)


def render(data: ReportData, *, audio: str = "flac") -> str:
    """Render a report to HTML text: everything inline, the same text for the same data."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sidechain.report", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["cell"] = _cell
    source, _, _ = jinja2.PackageLoader("sidechain.report", "templates").get_source(
        environment, "style.css"
    )
    return environment.get_template("report.html.j2").render(
        data=data,
        style=Markup(source),
        version=__version__,
        impacts=[(one, _heatmap(one), _site_table(one)) for one in data.impacts],
        cumulative=_cumulative(data),
        tradeoffs=_tradeoffs(data.tradeoffs),
        steering=_steering_table(data.tradeoffs),
        sweeps=[(sweep, _clips(sweep, audio)) for sweep in data.sweeps],
        dictionaries=_dictionaries(data),
        features=[(card, _feature_clips(card, audio)) for card in data.features],
    )


def _picture(
    draw: Callable[[Mode, Width], Figure], alt: str, caption: str, *, heat: bool = False
) -> Picture:
    """Draw all variants; without a heat map the dark ones are the light ones recoloured."""
    drawn: dict[tuple[Mode, Width], tuple[str, int, int]] = {}
    for width in WIDTHS:
        figure = draw("light", width)
        across, down = (round(inches * 96) for inches in figure.get_size_inches())
        light = svg(figure)
        drawn["light", width] = (light, across, down)
        dark = svg(draw("dark", width)) if heat else darkened(light)
        drawn["dark", width] = (dark, across, down)
    sources = []
    for mode, width, media in VARIANTS:
        text, across, down = drawn[mode, width]
        sources.append((media, data_uri(text, "image/svg+xml"), across, down))
    return Picture(sources, alt, caption)


def _heatmap(one: ImpactMap) -> Picture:
    best = one.sites[ranking([mean.value for mean in one.means])[0]]
    reached = [
        site
        for site, hit in zip(
            one.sites, functional([mean.value for mean in one.means], one.tau), strict=True
        )
        if hit
    ]
    verdict = (
        f"Framed: mean impact of at least {one.tau:.2f} ({', '.join(reached)})."
        if reached
        else f"No mean impact reaches {one.tau:.2f}."
    )
    level = one.means[0].level
    caption = (
        f"{one.title}, {one.judge} judge. Impact: share of the effect of the full prompt that "
        f"enters through the site; 0 none, 1 all of it. {level:.0%} intervals (prompt pairs "
        f"resampled) stand in small print or in the table. {verdict} {one.note}"
    )
    alt = (
        f"Heat map of the impact of {len(one.sites)} sites on {', '.join(one.concepts)}; "
        f"largest mean at {best}. Values in the table below."
    )
    return _picture(
        lambda mode, width: figures.impact_heatmap(one, theme=mode, width=width),
        alt,
        caption.strip(),
        heat=True,
    )


def _site_table(one: ImpactMap) -> Table:
    means = [mean.value for mean in one.means]
    reached = functional(means, one.tau)
    rows = [
        [
            one.sites[site],
            one.means[site],
            "yes" if reached[site] else "no",
            *(row[site] for row in one.impacts),
        ]
        for site in ranking(means)
    ]
    columns = ["site", "mean impact", f"≥ {one.tau:.2f}", *one.concepts]
    return Table(f"{one.title}, {one.judge} judge", columns, rows, f"n = {one.means[0].n} pairs")


def _cumulative(data: ReportData) -> Picture | None:
    if not data.cumulative:
        return None
    needed = "; ".join(
        f"{one.label} ({one.judge} judge) "
        + ("never" if one.curve.needed is None else f"at {one.curve.needed}")
        for one in data.cumulative
    )
    share = data.cumulative[0].curve.share
    return _picture(
        lambda mode, width: figures.cumulative(data.cumulative, theme=mode, width=width),
        f"Share of the full effect against the number of sites patched. {share:.0%} reached: "
        f"{needed}.",
        f"Best sites added one by one. Rings: the smallest number that reaches {share:.0%}.",
    )


def _tradeoffs(tradeoffs: Sequence[Tradeoff]) -> list[tuple[str, Picture]]:
    pictures = []
    for concept in dict.fromkeys(one.concept for one in tradeoffs):
        group = [one for one in tradeoffs if one.concept == concept]
        first = group[0]
        level = first.arms[0].alignment[0].level
        units = f" over {first.prompts} prompts" if first.prompts else ""
        cutoff = " Dashed upright: cut-off of the area." if first.cutoff is not None else ""
        caption = (
            f"Steering towards {concept}. Bands: {level:.0%} intervals{units}. Dashed level: "
            f"{first.kept_label} {first.kept_floor:.2f}.{cutoff}"
        )
        alt = f"{first.alignment_label} over distance and strength. " + " ".join(
            _in_words(one, arm) for one in group for arm in one.arms
        )
        draw = _drawer(group)
        pictures.append((concept, _picture(draw, alt, caption)))
    return pictures


def _drawer(group: Sequence[Tradeoff]) -> Callable[[Mode, Width], Figure]:
    return lambda mode, width: figures.tradeoff(group, theme=mode, width=width)


def _in_words(one: Tradeoff, arm: Arm) -> str:
    point = arm.operating_point(one.kept_floor)
    best = "never kept enough" if point is None else f"up to {arm.alignment[point].value:.2f}"
    return f"{one.judge} judge, {arm.label}: {best}."


def _steering_table(tradeoffs: Sequence[Tradeoff]) -> Table | None:
    if not tradeoffs:
        return None
    rows: list[list[object]] = []
    for one in tradeoffs:
        for arm in one.arms:
            start = list(arm.strength).index(0.0) if 0.0 in list(arm.strength) else None
            point = arm.operating_point(one.kept_floor)
            rows.append(
                [
                    one.concept,
                    one.judge,
                    arm.label,
                    arm.alignment[start] if start is not None else math.nan,
                    arm.alignment[point] if point is not None else math.nan,
                    f"{arm.strength[point]:+g}" if point is not None else "\u2013",
                    arm.kept[point] if point is not None and arm.kept else math.nan,
                    math.nan if arm.auc is None else f"{arm.auc:.3f}",
                    math.nan if arm.smoothness is None else f"{arm.smoothness:.3f}",
                ]
            )
    floor = tradeoffs[0].kept_floor
    columns = [
        "concept", "judge", "arm", "P unsteered", f"best P at kept ≥ {floor:g}", "at strength",
        "kept there", "AUC ↑", "smoothness ↓",
    ]  # fmt: skip
    return Table("Arms compared", columns, rows)


def _clips(sweep: Sweep, kind: str) -> list[dict[str, Any]]:
    low, high = figures.mel_range(sweep)
    shown = []
    for clip in sweep.clips:
        image = sound = ""
        if clip.mel is not None:
            image = data_uri(spectrogram_png(clip.mel, low, high), "image/png")
        if clip.audio is not None:
            sound = data_uri(audio_bytes(clip.audio, sweep.sample_rate, kind), f"audio/{kind}")
        shown.append(
            {
                "name": f"{clip.strength:+g}" if clip.strength else "unsteered",
                "clip": clip,
                "image": image,
                "audio": sound,
                "type": f"audio/{kind}",
            }
        )
    return shown


def _dictionaries(data: ReportData) -> Picture | None:
    rows = data.dictionaries
    if not rows:
        return None
    dead = "; ".join(f"{one.site} {sum(d == 0 for d in one.density)}" for one in rows)
    return _picture(
        lambda mode, width: dictionary_figures.dictionary_health(rows, theme=mode, width=width),
        f"Unexplained variance of {len(rows)} dictionaries by step, and how often features fire.",
        "Left: share of a step's variance that the reconstruction leaves. Right: features by the "
        f"share of tokens in which they are active. Never active here: {dead}.",
    )


def _feature_clips(card: FeatureCard, kind: str) -> list[dict[str, Any]]:
    mels = [clip.mel for clip in card.clips if clip.mel is not None]
    low = min((float(m.min()) for m in mels), default=0.0)
    high = max((float(m.max()) for m in mels), default=1.0)
    top = max((max(clip.trace, default=0.0) for clip in card.clips), default=0.0) or 1.0
    shown = []
    for clip in card.clips:
        image = sound = ""
        if clip.mel is not None:
            image = data_uri(spectrogram_png(clip.mel, low, high), "image/png")
        if clip.audio is not None:
            sound = data_uri(audio_bytes(clip.audio, card.sample_rate, kind), f"audio/{kind}")
        count = max(1, len(clip.trace))
        # One bar for each token, so that a single active token stays visible.
        bars = [
            (100 * index / count, 100 / count, 30 * value / top)
            for index, value in enumerate(clip.trace)
            if value > 0
        ]
        when = "global token" if clip.place is None else f"{clip.place * card.seconds:.2f} s"
        shown.append({"clip": clip, "image": image, "audio": sound, "bars": bars, "when": when})
    return shown


def _cell(value: object) -> Markup | str:
    """Format one table cell: intervals with their ends in small print, numbers aligned."""
    if isinstance(value, Interval):
        if math.isnan(value.value):
            return "\u2013"
        main = _number(value.value)
        if math.isnan(value.low):
            return main
        ends = f"{_number(value.low)} to {_number(value.high)}"
        return Markup('{} <span class="ends">{}</span>').format(main, ends)
    if isinstance(value, float):
        return "\u2013" if math.isnan(value) else _number(value)
    return str(value)


def _number(value: float) -> str:
    text = f"{value:.2f}"
    return "0.00" if text == "-0.00" else text.replace("-", "\u2212")
