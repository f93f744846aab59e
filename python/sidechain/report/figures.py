# SPDX-License-Identifier: Apache-2.0
"""Figures of localization and steering: each takes what was measured, a theme and a width."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from sidechain.metrics.bootstrap import Interval
from sidechain.metrics.impact import Cumulative, functional
from sidechain.metrics.results import KEPT_FLOOR, ArmCurve, Impacts
from sidechain.metrics.thresholds import TAU
from sidechain.report.theme import Mode, Theme, Width, drawing

BAND = 0.16  # opacity of interval bands
DOTTED = (0, (1, 1.2))
MARKERS = ("o", "s", "D", "^", "v", "P")

#: Arm of a sweep -> how figures and tables call it.
ARM_LABELS: Mapping[str, str] = {
    "localized": "localized sites",
    "all": "all sites",
    "ablated": "all but localized",
    "random": "random direction",
}


def impact_heatmap(
    found: Impacts, *, tau: float = TAU, theme: Mode = "light", width: Width = "wide"
) -> Figure:
    """Heat map of impact, site by concept, with the mean set apart.

    Wide: sites run to the right and each cell notes its interval where it fits. Narrow: sites run
    down. Means that reach the threshold `tau` are framed.
    """
    cells = [*found.impacts, found.means]
    values = np.array([[cell.value for cell in row] for row in cells])
    rows, columns, wide = [*found.concepts, "mean"], list(found.sites), width == "wide"
    gap_row = len(found.concepts)
    height = 0.5 * len(rows) + 0.95 if wide else 0.29 * len(columns) + 1.5
    with drawing(theme, width, height) as (figure, colours):
        axes = figure.add_subplot()
        reached = functional([mean.value for mean in found.means], tau)
        top = max(1.0, float(np.nanmax(values, initial=0.0)))
        for row in range(len(rows)):
            for column in range(len(columns)):
                place = (column, row) if wide else (row, column)
                offset = 0.18 if row == gap_row else 0.0  # the mean stands apart
                x, y = place[0] + offset * (not wide), place[1] + offset * wide
                roomy = wide and len(columns) <= 12
                _cell(axes, colours, (x, y), cells[row][column], top, intervals=roomy)
                if row == gap_row and reached[column]:
                    _frame(axes, colours, (x, y))
        _name_cells(axes, colours, rows, columns, wide=wide)
        scale = figure.colorbar(
            ScalarMappable(Normalize(0.0, top), colours.heat.resampled(32)),
            ax=axes,
            orientation="vertical" if wide else "horizontal",
            fraction=0.02 if wide else 0.03,
            pad=0.015 if wide else 0.03,
            label="impact",
        )
        scale.outline.set_edgecolor(colours.line)  # type: ignore[operator, unused-ignore]
        if scale.solids is not None:
            scale.solids.set_edgecolor("face")  # no hairlines between the steps
    return figure


def _name_cells(
    axes: Axes, theme: Theme, rows: Sequence[str], columns: Sequence[str], *, wide: bool
) -> None:
    """Write sites and concepts beside the cells, and take away what a plot has besides."""
    last = len(rows) - 1
    positions = [i + (0.18 if i == last else 0.0) for i in range(len(rows))]
    long = range(len(columns))
    axes.set_xlim(-0.5, len(columns) - 0.5 if wide else positions[-1] + 0.5)
    axes.set_ylim((positions[-1] if wide else len(columns) - 1) + 0.5, -0.5)
    axes.set_xticks(long if wide else positions, columns if wide else rows)
    axes.set_yticks(positions if wide else long, rows if wide else columns)
    axes.xaxis.tick_top()
    axes.tick_params(length=0, labelcolor=theme.ink)
    if not wide or len(columns) > 12:
        axes.tick_params(axis="x", labelrotation=60 if wide else 40)
        for label in axes.get_xticklabels():
            label.set_horizontalalignment("left")
            label.set_rotation_mode("anchor")
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)


def tradeoff(
    scorers: Mapping[str, Mapping[str, ArmCurve]],
    *,
    concept: str,
    kept: str,
    score: str | None = None,
    cutoffs: Mapping[str, float] | None = None,
    theme: Mode = "light",
    width: Width = "wide",
) -> Figure:
    """Score over distance, and score and preservation over strength; a row of panels per scorer.

    Bands are the intervals given. Narrow figures stack the panels.

    Args:
        scorers: curves by scorer and arm; the first arm is drawn on top.
        concept: steered towards.
        kept: what should stay.
        score: what the score is called. None = P(concept).
        cutoffs: distance up to which the area counts, by scorer.
        theme: "light" or "dark".
        width: "wide" or "narrow".
    """
    if not any(scorers.values()):
        raise ValueError("tradeoff: expected at least one set of curves, got none")
    wide, kinds = width == "wide", ("distance", "strength", "kept")
    grid = (len(scorers), len(kinds)) if wide else (len(scorers) * len(kinds), 1)
    labels = {"kept": f"{kept} kept"}
    with drawing(theme, width, 0.45 + (2.55 if wide else 2.3) * grid[0]) as (figure, colours):
        panels = iter(figure.subplots(*grid, squeeze=False).reshape(-1))
        for name, arms in scorers.items():
            for kind in kinds:
                axes = next(panels)
                _tradeoff_panel(axes, arms, kind, colours)
                axes.set_ylabel(labels.get(kind, score or f"P({concept})"))
                axes.set_title(f"{name} scorer: {_KINDS[kind]}")
                if kind == "distance" and name in (cutoffs or {}):
                    axes.axvline((cutoffs or {})[name], **_guide(colours))
        handles = _arm_handles(scorers, colours)
        figure.legend(
            handles=handles,
            loc="outside upper left",
            ncols=len(handles) if wide else 2,
            labelcolor=colours.ink,
        )
    return figure


def cumulative(
    curves: Mapping[str, Cumulative], *, theme: Mode = "light", width: Width = "wide"
) -> Figure:
    """Share of the full effect with the best k sites patched, by label; "mean" stands out.

    A ring marks the smallest k that reaches the share asked for.
    """
    if not curves:
        raise ValueError("cumulative: expected at least one curve, got none")
    wide = width == "wide"
    lines = math.ceil(len(curves) / (7 if wide else 3))
    with drawing(theme, width, (3.2 if wide else 2.7) + 0.22 * lines) as (figure, colours):
        axes = figure.add_subplot()
        for index, (label, one) in enumerate(curves.items()):
            bold = label == "mean"
            colour = colours.ink if bold else colours.others[index % len(colours.others)]
            marker = MARKERS[index % len(MARKERS)]
            weight, order = (2.4, 4) if bold else (1.4, 3)
            axes.plot(one.effect, color=colour, lw=weight, marker=marker, label=label, zorder=order)
            if one.needed is not None:
                at = one.effect[one.needed]
                axes.plot(one.needed, at, "o", ms=9, mfc="none", mec=colour)
        share = next(iter(curves.values())).share
        axes.axhline(share, **_guide(colours))
        axes.annotate(
            f"{share:.0%} of the full effect",
            (0, share),  # on the left, where every curve is still low
            xycoords=("axes fraction", "data"),
            xytext=(3, 2),
            textcoords="offset points",
            va="bottom",
            color=colours.soft,
            fontsize=8,
        )
        axes.set_xlabel("sites patched, best first")
        axes.set_ylabel("share of full effect")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.legend(
            loc="outside upper left",
            ncols=7 if wide else 3,
            labelcolor=colours.ink,
            handlelength=1.6,
            columnspacing=1.4,
        )
    return figure


def _cell(
    axes: Axes,
    theme: Theme,
    place: tuple[float, float],
    cell: Interval,
    top: float,
    *,
    intervals: bool,
) -> None:
    x, y = place
    known = not math.isnan(cell.value)
    level = max(0.0, cell.value) / top if known else 0.0
    axes.add_patch(
        Rectangle(
            (x - 0.47, y - 0.47),
            0.94,
            0.94,
            facecolor=theme.heat(level) if known else "none",
            edgecolor=theme.line,
            linewidth=0.6,
            hatch=None if known else "////",
        )
    )
    red, green, blue, _ = theme.heat(level)
    bright = 0.299 * red + 0.587 * green + 0.114 * blue > 0.55
    colour = "#10151b" if bright else "#f4f7fa"
    quiet = known and cell.value < 0.05
    text = _short(cell.value) if known else "\u2013"
    lift = 0.13 if intervals and known else 0.0
    axes.text(
        x,
        y - lift,
        text,
        ha="center",
        va="center",
        color=colour,
        alpha=0.55 if quiet else 1.0,
        fontsize=9.5 if intervals else 8.5,
    )
    if intervals and known and not math.isnan(cell.low):
        axes.text(
            x,
            y + 0.24,
            f"{_short(cell.low)} to {_short(cell.high)}",
            ha="center",
            va="center",
            color=colour,
            alpha=0.55 if quiet else 0.8,
            fontsize=7,
        )


def _frame(axes: Axes, theme: Theme, place: tuple[float, float]) -> None:
    axes.add_patch(
        Rectangle(
            (place[0] - 0.47, place[1] - 0.47),
            0.94,
            0.94,
            facecolor="none",
            edgecolor=theme.arms["all"],
            linewidth=2.0,
            zorder=5,
        )
    )


_KINDS = {"distance": "effect at a distance", "strength": "effect", "kept": "preservation"}


def _guide(theme: Theme) -> dict[str, Any]:
    """Type of the dashed lines that mark a level."""
    return {"color": theme.soft, "linewidth": 0.9, "linestyle": (0, (4, 3))}


def _tradeoff_panel(axes: Axes, arms: Mapping[str, ArmCurve], kind: str, theme: Theme) -> None:
    for index, (name, curve) in reversed(list(enumerate(arms.items()))):
        _arm(axes, curve, kind, theme.colour(name, index), MARKERS[index % len(MARKERS)])
    if kind == "distance":
        axes.set_xlabel("distance to the unsteered clip")
        axes.set_xlim(left=0)
    else:
        axes.set_xlabel("steering strength")
    if kind == "kept":
        axes.axhline(KEPT_FLOOR, **_guide(theme))
    points = [p for one in arms.values() for p in (one.kept if kind == "kept" else one.score)]
    if all(-1e-6 <= point.value <= 1 + 1e-6 for point in points):
        axes.set_ylim(-0.03, 1.03)


def _arm_handles(scorers: Mapping[str, Mapping[str, ArmCurve]], theme: Theme) -> list[Line2D]:
    handles: dict[str, Line2D] = {}
    for arms in scorers.values():
        for index, name in enumerate(arms):
            colour, marker = theme.colour(name, index), MARKERS[index % len(MARKERS)]
            label = ARM_LABELS.get(name, name)
            handles[label] = Line2D([], [], color=colour, marker=marker, label=label)
    if any(min(one.strength) < 0 for arms in scorers.values() for one in arms.values()):
        handles[""] = Line2D([], [], color=theme.soft, linestyle=DOTTED, label="negative strength")
    return list(handles.values())


def _arm(axes: Axes, arm: ArmCurve, kind: str, colour: str, marker: str) -> None:
    series = arm.kept if kind == "kept" else arm.score
    middle = np.array([point.value for point in series])
    low = np.array([point.low for point in series])
    high = np.array([point.high for point in series])
    if kind == "distance":
        for side in (1, -1):
            # each direction leaves the unsteered clip on its own
            order = [i for i in np.argsort(np.abs(arm.strength)) if arm.strength[i] * side >= 0]
            x = np.array([point.value for point in arm.distance])[order]
            if len(order) < 2:
                continue
            line = DOTTED if side < 0 else "-"
            axes.plot(x, middle[order], color=colour, marker=marker, linestyle=line)
            axes.fill_between(x, low[order], high[order], color=colour, alpha=BAND, linewidth=0)
        return
    axes.plot(arm.strength, middle, color=colour, marker=marker)
    axes.fill_between(arm.strength, low, high, color=colour, alpha=BAND, linewidth=0)


def _short(value: float) -> str:
    """Two decimals without a leading zero: .49, 1.25, −.03."""
    text = f"{abs(value):.2f}"
    text = text[1:] if text.startswith("0") else text
    return ("\u2212" if value <= -0.005 else "") + text
