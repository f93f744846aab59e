# SPDX-License-Identifier: Apache-2.0
"""Colours and type of figures: light and dark, wide and narrow, safe for colour-blind readers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure

Mode = Literal["light", "dark"]
Width = Literal["wide", "narrow"]

INCHES: Mapping[Width, float] = {"wide": 10.4, "narrow": 4.1}  # shown 1.4 x and 1.2 x larger
# names a browser resolves; the first that matplotlib knows measures the text
FONTS = ("Segoe UI", "Roboto", "Helvetica Neue", "Liberation Sans", "Arial", "DejaVu Sans")


@dataclass(frozen=True)
class Theme:
    """Colours of one mode.

    Attributes:
        ink: text and axes.
        soft: secondary text.
        line: grid and frames.
        paper: background, also of the page.
        arms: colour per arm (Okabe-Ito hues, lightness adapted to the paper).
        others: colours for further series.
        heat: sequential map that starts at the paper.
    """

    ink: str
    soft: str
    line: str
    paper: str
    arms: Mapping[str, str]
    others: tuple[str, ...]
    heat: Colormap

    def named(self) -> tuple[str, ...]:
        """List all colours but the heat map's, in the same order in every theme."""
        return (self.ink, self.soft, self.line, self.paper, *self.arms.values(), *self.others)

    def colour(self, name: str, index: int) -> str:
        """Colour of an arm by name, of anything else by position."""
        return self.arms.get(name, self.others[index % len(self.others)])


THEMES: Mapping[Mode, Theme] = {
    "light": Theme(
        ink="#1c2026",
        soft="#5d6673",
        line="#d9dde3",
        paper="#ffffff",
        arms={
            "localized": "#0067a5",
            "all": "#c8590a",
            "ablated": "#00836a",
            "random": "#7a828e",
        },
        others=("#0067a5", "#c8590a", "#00836a", "#a8447f", "#8a6d00", "#3f8fc4", "#5d6673"),
        heat=LinearSegmentedColormap.from_list(
            "heat-light", ["#ffffff", "#d8e8f3", "#8fbfdd", "#3b87b8", "#0f5583", "#08304f"]
        ),
    ),
    "dark": Theme(
        ink="#e7eaee",
        soft="#9aa4b1",
        line="#343b45",
        paper="#14171b",
        arms={
            "localized": "#5cb3ea",
            "all": "#f0944d",
            "ablated": "#35bf9f",
            "random": "#8d96a3",
        },
        others=("#5cb3ea", "#f0944d", "#35bf9f", "#e08fbe", "#d9bd4a", "#9fd0f0", "#9aa4b1"),
        heat=LinearSegmentedColormap.from_list(
            "heat-dark", ["#14171b", "#17374e", "#1d628f", "#3f97cb", "#93cbea", "#e4f3fc"]
        ),
    ),
}


def darkened(drawing: str) -> str:
    """Turn the SVG text of a light figure into its dark twin, colour by colour.

    Only for figures that use nothing but the named colours of a theme (not its heat map).
    """
    light, dark = THEMES["light"], THEMES["dark"]
    twins = dict(zip(light.named(), dark.named(), strict=True))
    return re.sub(r"#[0-9a-f]{6}\b", lambda found: twins.get(found[0], found[0]), drawing)


@contextmanager
def drawing(mode: Mode, width: Width, height: float) -> Iterator[tuple[Figure, Theme]]:
    """Yield an empty figure under the settings of a theme; pyplot's state is not touched.

    Args:
        mode: "light" or "dark".
        width: "wide" for a page column, "narrow" for a telephone.
        height: in inches.
    """
    if mode not in THEMES or width not in INCHES:
        raise ValueError(
            f"figure: expected theme light|dark and width wide|narrow, got {mode!r} and {width!r}"
        )
    theme = THEMES[mode]
    with matplotlib.rc_context(_settings(theme)):
        figure = Figure(figsize=(INCHES[width], height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure, theme
        # ticks take their type when first drawn: draw under these settings, then fix the layout
        figure.draw_without_rendering()
        figure.set_layout_engine("none")


def _settings(theme: Theme) -> dict[Any, Any]:
    known = set(matplotlib.font_manager.get_font_names())
    return {
        "font.family": [name for name in FONTS if name in known] or ["sans-serif"],
        "font.size": 9.0,
        "axes.titlesize": 9.0,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.labelsize": 9.0,
        "axes.labelcolor": theme.soft,
        "axes.edgecolor": theme.line,
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.facecolor": "none",
        "axes.axisbelow": True,
        "axes.grid": True,
        "grid.color": theme.line,
        "grid.linewidth": 0.5,
        "figure.facecolor": theme.paper,
        "savefig.facecolor": theme.paper,
        "text.color": theme.ink,
        "axes.titlecolor": theme.ink,
        "xtick.color": theme.line,
        "ytick.color": theme.line,
        "xtick.labelcolor": theme.soft,
        "ytick.labelcolor": theme.soft,
        "xtick.labelsize": 8.5,
        "ytick.labelsize": 8.5,
        "xtick.major.size": 3.0,
        "ytick.major.size": 3.0,
        "lines.linewidth": 1.6,
        "lines.markersize": 3.6,
        "legend.frameon": False,
        "legend.fontsize": 8.5,
        "svg.fonttype": "none",
        "svg.hashsalt": "sidechain",
        "figure.constrained_layout.w_pad": 0.06,
        "figure.constrained_layout.h_pad": 0.06,
    }
