# SPDX-License-Identifier: Apache-2.0
"""Figures of localization and steering: each takes plain data, a theme and a width."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from sidechain.metrics.bootstrap import Interval
from sidechain.metrics.impact import functional
from sidechain.report.data import Arm, CumulativeCurve, ImpactMap, Sweep, Tradeoff
from sidechain.report.theme import Mode, Theme, Width, drawing

BAND = 0.16  # opacity of interval bands
DOTTED = (0, (1, 1.2))
MARKERS = ("o", "s", "D", "^", "v", "P")


def impact_heatmap(impacts: ImpactMap, *, theme: Mode = "light", width: Width = "wide") -> Figure:
    """Heat map of impact, site by concept, with the mean set apart.

    Wide: sites run to the right and each cell notes its interval where it fits. Narrow: sites run
    down. Means that reach the threshold are framed.
    """
    values = np.array([[cell.value for cell in row] for row in (*impacts.impacts, impacts.means)])
    cells = [*impacts.impacts, impacts.means]
    rows = [*impacts.concepts, "mean"]
    columns = list(impacts.sites)
    gap_row = len(impacts.concepts)
    wide = width == "wide"
    height = 0.5 * len(rows) + 0.9 if wide else 0.29 * len(columns) + 0.95
    with drawing(theme, width, height) as (figure, colours):
        axes = figure.add_subplot()
        reached = functional([mean.value for mean in impacts.means], impacts.tau)
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
        long, short = len(columns), len(rows)
        x_count, y_count = (long, short) if wide else (short, long)
        x_names, y_names = (columns, rows) if wide else (rows, columns)
        positions = [i + (0.18 if i == gap_row else 0.0) for i in range(short)]
        axes.set_xlim(-0.5, (x_count - 0.5) if wide else positions[-1] + 0.5)
        axes.set_ylim((positions[-1] if wide else y_count - 1) + 0.5, -0.5)
        axes.set_xticks(range(long) if wide else positions, x_names)
        axes.set_yticks(positions if wide else range(long), y_names)
        axes.xaxis.tick_top()
        axes.tick_params(length=0, labelcolor=colours.ink)
        if not wide or len(columns) > 12:
            axes.tick_params(axis="x", labelrotation=40 if not wide else 60)
            for label in axes.get_xticklabels():
                label.set_horizontalalignment("left")
                label.set_rotation_mode("anchor")
        axes.grid(False)
        for spine in axes.spines.values():
            spine.set_visible(False)
    return figure


def tradeoff(curves: Sequence[Tradeoff], *, theme: Mode = "light", width: Width = "wide") -> Figure:
    """Alignment over distance, and alignment and preservation over strength; a row per judge.

    Bands are the intervals given. Narrow figures stack the panels.
    """
    if not curves:
        raise ValueError("tradeoff: expected at least one set of curves, got none")
    kinds = ["distance", "strength"]
    if any(arm.kept for one in curves for arm in one.arms):
        kinds.append("kept")
    wide = width == "wide"
    grid = (len(curves), len(kinds)) if wide else (len(curves) * len(kinds), 1)
    height = 0.45 + (2.55 if wide else 2.3) * grid[0]
    with drawing(theme, width, height) as (figure, colours):
        panels = figure.subplots(*grid, squeeze=False).reshape(-1)
        for row, one in enumerate(curves):
            for column, kind in enumerate(kinds):
                axes = panels[row * len(kinds) + column]
                _tradeoff_panel(axes, one, kind, colours)
        handles = _arm_handles(curves, colours)
        figure.legend(
            handles=handles,
            loc="outside upper left",
            ncols=len(handles) if wide else 2,
            labelcolor=colours.ink,
        )
    return figure


def cumulative(
    curves: Sequence[CumulativeCurve], *, theme: Mode = "light", width: Width = "wide"
) -> Figure:
    """Share of the full effect with the best k sites patched; a panel per judge.

    A ring marks the smallest k that reaches the share asked for.
    """
    judges = list(dict.fromkeys(curve.judge for curve in curves))
    if not judges:
        raise ValueError("cumulative: expected at least one curve, got none")
    wide = width == "wide"
    grid = (1, len(judges)) if wide else (len(judges), 1)
    with drawing(theme, width, 3.2 if wide else 0.6 + 2.5 * len(judges)) as (figure, colours):
        panels = figure.subplots(*grid, squeeze=False).reshape(-1)
        labels = list(dict.fromkeys(curve.label for curve in curves))
        for axes, judge in zip(panels, judges, strict=True):
            for one in (curve for curve in curves if curve.judge == judge):
                index = labels.index(one.label)
                colour, effect = colours.others[index % len(colours.others)], one.curve.effect
                bold = one.label == "mean"
                axes.plot(
                    range(len(effect)),
                    effect,
                    color=colours.ink if bold else colour,
                    linewidth=2.4 if bold else 1.4,
                    marker=MARKERS[index % len(MARKERS)],
                    label=one.label,
                    zorder=4 if bold else 3,
                )
                if one.curve.needed is not None:
                    needed = one.curve.needed
                    axes.plot(
                        needed,
                        effect[needed],
                        marker="o",
                        markersize=9,
                        markerfacecolor="none",
                        markeredgecolor=colours.ink if bold else colour,
                    )
            share = next(curve.curve.share for curve in curves if curve.judge == judge)
            axes.axhline(share, color=colours.soft, linewidth=0.9, linestyle=(0, (4, 3)))
            axes.annotate(
                f"{share:.0%} of the full effect",
                (1, share),
                xycoords=("axes fraction", "data"),
                xytext=(-2, -3),
                textcoords="offset points",
                ha="right",
                va="top",
                color=colours.soft,
                fontsize=8,
            )
            axes.set_title(f"{judge} judge")
            axes.set_xlabel("sites patched, best first")
            axes.set_ylabel("share of full effect")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        handles, names = panels[0].get_legend_handles_labels()
        figure.legend(
            handles,
            names,
            loc="outside upper left",
            ncols=7 if wide else 3,
            labelcolor=colours.ink,
            handlelength=1.6,
            columnspacing=1.4,
        )
    return figure


def spectrogram_strip(sweep: Sweep, *, theme: Mode = "light", width: Width = "wide") -> Figure:
    """Log-mel spectrograms of a sweep side by side, P(concept) under each."""
    shown = [clip for clip in sweep.clips if clip.mel is not None]
    if not shown:
        raise ValueError("spectrogram_strip: expected clips with a mel spectrogram, got none")
    columns = min(len(shown), 7 if width == "wide" else 2)
    lines = math.ceil(len(shown) / columns)
    low, high = mel_range(sweep)
    with drawing(theme, width, 0.35 + 1.75 * lines) as (figure, colours):
        panels = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
        for axes in panels.reshape(-1)[len(shown) :]:
            axes.set_visible(False)
        for index, (axes, clip) in enumerate(zip(panels.reshape(-1), shown, strict=False)):
            mel = np.asarray(clip.mel).T
            extent = (0, sweep.seconds, 0, mel.shape[0])
            axes.imshow(
                mel,
                origin="lower",
                aspect="auto",
                extent=extent,
                cmap="magma",
                vmin=low,
                vmax=high,
            )
            axes.grid(False)
            axes.set_title(f"strength {clip.strength:+g}" if clip.strength else "unsteered")
            marks = ", ".join(f"{value:.2f}" for value in clip.probabilities.values())
            axes.set_xlabel(f"P({sweep.concept}) {marks}" if marks else "", color=colours.ink)
            axes.set_xticks([0, sweep.seconds], ["0", f"{sweep.seconds:.3g} s"])
            axes.set_yticks([0, mel.shape[0]], [_hertz(sweep.hertz[0]), _hertz(sweep.hertz[1])])
            if index % columns == 0:
                axes.set_ylabel("frequency (mel)")
    return figure


def mel_range(sweep: Sweep) -> tuple[float, float]:
    """Colour range shared by all clips of a sweep: 1st and 99.7th percentile."""
    values = [np.asarray(clip.mel).reshape(-1) for clip in sweep.clips if clip.mel is not None]
    if not values:
        return 0.0, 1.0
    low, high = np.nanquantile(np.concatenate(values), [0.01, 0.997])
    return float(low), float(high)


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


def _tradeoff_panel(axes: Axes, one: Tradeoff, kind: str, theme: Theme) -> None:
    for index, arm in reversed(list(enumerate(one.arms))):
        if kind == "kept" and not arm.kept:
            continue
        _arm(axes, arm, kind, theme.colour(arm.name, index), MARKERS[index % len(MARKERS)])
    if kind == "distance":
        axes.set_xlabel("distance to the unsteered clip (judge features)")
        axes.set_xlim(left=0)
        if one.cutoff is not None:
            axes.axvline(one.cutoff, color=theme.soft, linewidth=0.9, linestyle=(0, (4, 3)))
    else:
        axes.set_xlabel("steering strength")
    axes.set_ylabel(one.kept_label if kind == "kept" else one.alignment_label)
    if kind == "kept":
        axes.axhline(one.kept_floor, color=theme.soft, linewidth=0.9, linestyle=(0, (4, 3)))
    if _is_share(one.arms, kind):
        axes.set_ylim(-0.03, 1.03)
    titles = {"distance": "effect at a distance", "strength": "effect", "kept": "preservation"}
    axes.set_title(f"{one.judge} judge: {titles[kind]}")


def _arm_handles(curves: Sequence[Tradeoff], theme: Theme) -> list[Line2D]:
    handles: dict[str, Line2D] = {}
    for one in curves:
        for index, arm in enumerate(one.arms):
            colour, marker = theme.colour(arm.name, index), MARKERS[index % len(MARKERS)]
            handles[arm.label] = Line2D([], [], color=colour, marker=marker, label=arm.label)
    if any(min(arm.strength) < 0 for one in curves for arm in one.arms):
        handles[""] = Line2D([], [], color=theme.soft, linestyle=DOTTED, label="negative strength")
    return list(handles.values())


def _arm(axes: Axes, arm: Arm, kind: str, colour: str, marker: str) -> None:
    series = arm.kept if kind == "kept" else arm.alignment
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


def _is_share(arms: Sequence[Arm], kind: str) -> bool:
    values = [
        point.value for arm in arms for point in (arm.kept if kind == "kept" else arm.alignment)
    ]
    return all(-1e-6 <= value <= 1 + 1e-6 for value in values)


def _short(value: float) -> str:
    """Two decimals without a leading zero: .49, 1.25, −.03."""
    text = f"{abs(value):.2f}"
    text = text[1:] if text.startswith("0") else text
    return ("\u2212" if value <= -0.005 else "") + text


def _hertz(value: float) -> str:
    return f"{value / 1000:g} kHz" if value >= 1000 else f"{value:g} Hz"
