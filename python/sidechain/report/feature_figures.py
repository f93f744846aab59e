# SPDX-License-Identifier: Apache-2.0
"""Figures of dictionaries: what they leave unexplained, how often features fire."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sidechain.report.theme import Mode, Theme, Width, drawing


class Health(Protocol):
    """What is drawn of a dictionary; arrays of any kind."""

    @property
    def steps(self) -> Any:
        """Scheduler steps [S]."""

    @property
    def step_fvu(self) -> Any:
        """Unexplained share of the variance of each step [S]."""

    @property
    def density(self) -> Any:
        """Share of tokens in which each feature is active [F]."""


BINS = np.linspace(-6.0, 0.0, 37)


def dictionary_health(
    rows: Mapping[str, Health], *, theme: Mode = "light", width: Width = "wide"
) -> Figure:
    """Unexplained variance over steps, and a histogram of feature densities; by site."""
    if not rows:
        raise ValueError("dictionary_health: expected at least one dictionary, got none")
    wide = width == "wide"
    with drawing(theme, width, 3.1 if wide else 5.4) as (figure, colours):
        first, second = figure.subplots(1, 2) if wide else figure.subplots(2, 1)
        _unexplained(first, rows, colours)
        _densities(second, rows, colours)
        handles, labels = first.get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside lower center", ncols=min(8, len(rows)) if wide else 4
        )
    return figure


def feature_densities(
    rows: Mapping[str, Health], *, theme: Mode = "light", width: Width = "wide"
) -> Figure:
    """Histogram of the share of rows in which features are active, by name of the dictionary."""
    if not rows:
        raise ValueError("feature_densities: expected at least one dictionary, got none")
    with drawing(theme, width, 2.9) as (figure, colours):
        _densities(figure.subplots(), rows, colours, "share of rows, log10")
    return figure


def _unexplained(axes: Axes, rows: Mapping[str, Health], colours: Theme) -> None:
    for index, (site, one) in enumerate(rows.items()):
        colour, steps, fvu = (
            _colour(colours, index),
            np.asarray(one.steps),
            np.asarray(one.step_fvu),
        )
        axes.plot(steps, fvu, color=colour, label=site, ls=_dash(index))
    axes.set_title("Unexplained variance by step")
    axes.set_xlabel("scheduler step")
    axes.set_ylabel("FVU")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _densities(
    axes: Axes, rows: Mapping[str, Health], colours: Theme, label: str = "share of tokens, log10"
) -> None:
    for index, one in enumerate(rows.values()):
        density = np.asarray(one.density, dtype=np.float64)
        alive = np.log10(np.clip(density[density > 0], 1e-6, 1.0))
        counts, _ = np.histogram(alive, BINS)
        axes.stairs(
            counts / max(1, len(density)),
            BINS,
            color=_colour(colours, index),
            ls=_dash(index),
            lw=1.6,
        )
    axes.set_title("How often features fire")
    axes.set_xlabel(label)
    axes.set_ylabel("share of features")
    axes.set_xlim(-5.2, 0.0)


def _colour(colours: Theme, index: int) -> str:
    return colours.others[index % len(colours.others)]


def _dash(index: int) -> str:
    return "-" if index < 6 else "--"  # two neighbours in hue stay apart
