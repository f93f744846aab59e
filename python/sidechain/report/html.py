# SPDX-License-Identifier: Apache-2.0
"""One self-contained HTML page: figures, tables and playable audio, no outside files."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from sidechain._version import __version__
from sidechain.io.atomic import write_atomic
from sidechain.metrics.bootstrap import Interval
from sidechain.report.data import Page, Picture, Strip
from sidechain.report.media import audio_bytes, data_uri, spectrogram_png, svg
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


def write_page(page: Page, path: str | Path, *, audio: str = "flac") -> Path:
    """Render a page and write it as one file, whole or not at all.

    Args:
        page: what to show.
        path: the HTML file; its folder is made if need be.
        audio: "flac" or "wav".

    Returns:
        The path.
    """
    return write_atomic(path, render(page, audio=audio).encode(), parents=True)


def render(page: Page, *, audio: str = "flac") -> str:
    """Render a page to HTML text: everything inline, the same text for the same data."""
    loader = jinja2.PackageLoader("sidechain.report", "templates")
    environment = jinja2.Environment(
        loader=loader,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["cell"] = _cell
    environment.filters["encoded"] = lambda strip: _encoded(strip, audio)
    style, _, _ = loader.get_source(environment, "style.css")
    return environment.get_template("report.html.j2").render(
        page=page,
        sections=[section for section in page.sections if section.blocks],
        style=Markup(style),
        version=__version__,
    )


def picture(
    draw: Callable[[Mode, Width], Figure], alt: str, caption: str, *, heat: bool = False
) -> Picture:
    """Draw a figure in all variants.

    Args:
        draw: the figure in a theme and a width.
        alt: what it shows, for who cannot see it.
        caption: text below.
        heat: whether a colour map is in it; without one the dark variants are the light ones
            recoloured.
    """
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


def _encoded(strip: Strip, kind: str) -> list[dict[str, Any]]:
    """Images, sounds and bars of the clips of a strip, on one scale."""
    mels = [np.asarray(clip.mel).reshape(-1) for clip in strip.clips if clip.mel is not None]
    low, high = np.nanquantile(np.concatenate(mels), [0.01, 0.997]) if mels else (0.0, 1.0)
    top = max((max(clip.trace or (0.0,)) for clip in strip.clips), default=0.0) or 1.0
    shown = []
    for clip in strip.clips:
        image = sound = ""
        if clip.mel is not None:
            image = data_uri(spectrogram_png(clip.mel, float(low), float(high)), "image/png")
        if clip.audio is not None:
            sound = data_uri(audio_bytes(clip.audio, strip.sample_rate, kind), f"audio/{kind}")
        item = "" if clip.image is None else data_uri(clip.image, "image/png")
        count = max(1, len(clip.trace or ()))
        # One bar for each value, so that a single large one stays visible.
        bars = [
            (100 * index / count, 100 / count, 30 * value / top)
            for index, value in enumerate(clip.trace or ())
            if value > 0
        ]
        shown.append({"clip": clip, "image": image, "audio": sound, "bars": bars, "item": item})
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
