# SPDX-License-Identifier: Apache-2.0
"""`sidechain curves`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .._options import Settings, choice, flag, option, text
from .builder import Command


def _methods(name: str, value: Any) -> tuple[str, ...]:
    words = value.split(",") if isinstance(value, str) else value
    return tuple(word.strip() for word in words if word.strip())


@dataclass(frozen=True, kw_only=True)
class CurvesSettings(Settings):
    """Options of `sidechain curves`."""

    table: str = text(..., "the table; - reads standard input", "TABLE.csv", positional=True)
    cutoff: tuple[str, ...] = option(
        ("pci_all", "pci_loc"),
        "methods that set the cut-off; each concept needs rows of each",
        _methods,
        metavar="METHOD[,METHOD]",
    )
    direction: str = choice(
        "both",
        "sides to score: both, their mean (default, as published), or one for one-sided sweeps",
        ("both", "positive", "negative"),
    )
    mean: bool = flag("append the mean over concepts of each method")


def run(settings: CurvesSettings, given: Mapping[str, Any]) -> int:
    """Print the scores."""
    from ..metrics import curve_table
    from ..metrics.tables import write_table

    rows = curve_table.read_sweeps(settings.table)
    cutoff = list(settings.cutoff)
    scored = curve_table.score_sweeps(
        rows, cutoff=cutoff, directions=settings.direction, mean=settings.mean
    )
    for note in curve_table.undefined_directions(rows, cutoff, settings.direction):
        print(f"sidechain: note: {note}; scores left blank (see --direction)", file=sys.stderr)
    write_table(sys.stdout, curve_table.COLUMNS, scored)
    return 0


COMMAND = Command(
    CurvesSettings,
    run,
    "Score sweeps by the published definition. TABLE.csv has columns "
    "method,concept,alpha,lpaps,muqt,clap: alignment (muqt, clap; a blank column is allowed) and "
    "distance to the unsteered output (lpaps) per strength (alpha; its sign is the direction). "
    "Prints CSV, blank where a value is undefined. The cut-off of a concept and direction is the "
    "smallest of the largest distances reached by the cut-off methods.",
)
