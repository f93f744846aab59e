# SPDX-License-Identifier: Apache-2.0
"""Scores for a table of sweeps: any methods, any concepts, cut-off per concept and direction."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from sidechain.metrics import curves
from sidechain.metrics.tables import Row, read_table

CUTOFF_METHODS = ("pci_all", "pci_loc")
ALIGNMENTS = ("muqt", "clap")
COLUMNS = ("method", "concept", "auc_muqt", "auc_clap", "smooth_muqt", "smooth_clap")
DIRECTIONS: Mapping[str, tuple[int, ...]] = {"both": (1, -1), "positive": (1,), "negative": (-1,)}

Sweep = dict[str, list[float]]


def read_sweeps(path: str | Path) -> list[Row]:
    """Read a table with columns method,concept,alpha,lpaps,muqt,clap (others are ignored)."""
    return read_table(
        path,
        text=("method", "concept"),
        numbers=("alpha", "lpaps"),
        blank_numbers=ALIGNMENTS,
        name="curves",
    )


def score_sweeps(
    rows: Sequence[Row],
    *,
    cutoff: Sequence[str] = CUTOFF_METHODS,
    directions: str = "both",
    mean: bool = False,
) -> list[dict[str, object]]:
    """Score every method and concept of a table.

    The cut-off of a concept and direction is the smallest of the largest distances that the
    methods named in `cutoff` reach there; it is shared by all methods of that concept. A direction
    into which one of these methods has no point at all is undefined for the concept.

    Args:
        rows: method, concept, alpha, lpaps, muqt, clap each; an alignment that is NaN on all rows
            of a sweep is undefined for it.
        cutoff: the reference methods; every concept must have rows of each.
        directions: "both" (as published: the mean, undefined if either side is), "positive" or
            "negative".
        mean: append one row per method, concept "mean", over the concepts with a defined value.

    Returns:
        One dict per method and concept with keys `COLUMNS`, in order of first appearance.

    Raises:
        ValueError: a reference method is missing, or a sweep is malformed; names which.
    """
    if directions not in DIRECTIONS:
        raise ValueError(f"curves: expected directions {'|'.join(DIRECTIONS)}, got {directions!r}")
    if not cutoff:
        raise ValueError("curves: expected at least one cut-off method, got none")
    sweeps = _group(rows)
    limits = {
        concept: _limits(sweeps, concept, cutoff, DIRECTIONS[directions])
        for concept in dict.fromkeys(concept for _, concept in sweeps)
    }
    scored: list[dict[str, object]] = []
    for (method, concept), sweep in sweeps.items():
        row: dict[str, object] = {"method": method, "concept": concept}
        for alignment in ALIGNMENTS:
            auc, smooth = _score(sweep, alignment, limits[concept], f"{method}, {concept}")
            row[f"auc_{alignment}"], row[f"smooth_{alignment}"] = auc, smooth
        scored.append(row)
    return scored + _means(scored) if mean else scored


def undefined_directions(
    rows: Sequence[Row], cutoff: Sequence[str] = CUTOFF_METHODS, directions: str = "both"
) -> list[str]:
    """Describe the concepts that have a direction without a cut-off."""
    sweeps = _group(rows)
    notes = []
    for concept in dict.fromkeys(concept for _, concept in sweeps):
        for sign, limit in _limits(sweeps, concept, cutoff, DIRECTIONS[directions]).items():
            if math.isnan(limit):
                side = "positive" if sign > 0 else "negative"
                notes.append(f"concept {concept}: no {side} alpha for a cut-off method")
    return notes


def _group(rows: Sequence[Row]) -> dict[tuple[str, str], Sweep]:
    sweeps: dict[tuple[str, str], Sweep] = {}
    for row in rows:
        key = (str(row["method"]), str(row["concept"]))
        sweep = sweeps.setdefault(key, {name: [] for name in ("alpha", "lpaps", *ALIGNMENTS)})
        for name, values in sweep.items():
            values.append(float(row[name]))
    return sweeps


def _limits(
    sweeps: Mapping[tuple[str, str], Sweep],
    concept: str,
    cutoff: Sequence[str],
    signs: Sequence[int],
) -> dict[int, float]:
    missing = [method for method in cutoff if (method, concept) not in sweeps]
    if missing:
        present = ", ".join(method for method, other in sweeps if other == concept)
        raise ValueError(
            f"curves: expected rows of the cut-off methods {', '.join(cutoff)} for concept "
            f"{concept}, got none of {', '.join(missing)}; name others of its methods ({present}) "
            "with --cutoff"
        )
    references = [(sweeps[method, concept], method) for method in cutoff]
    limits = {}
    for sign in signs:
        reaches = []
        for sweep, method in references:
            with _named(f"{method}, {concept}"):
                reaches.append(curves.reach(sweep["lpaps"], sweep["alpha"], sign))
        limits[sign] = float(np.min(reaches))
    return limits


def _score(
    sweep: Sweep, alignment: str, limits: Mapping[int, float], label: str
) -> tuple[float, float]:
    values = np.asarray(sweep[alignment])
    if np.isnan(values).all():
        return math.nan, math.nan
    with _named(f"{label}, {alignment}"):
        result = curves.score(sweep["lpaps"], values, sweep["alpha"], limits)
    return result.auc, result.smoothness


@contextmanager
def _named(label: str) -> Iterator[None]:
    """Add the name of the sweep to a ValueError raised inside."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{error} ({label})") from None


def _means(scored: Sequence[Mapping[str, object]]) -> list[dict[str, object]]:
    means: list[dict[str, object]] = []
    for method in dict.fromkeys(row["method"] for row in scored):
        row: dict[str, object] = {"method": method, "concept": "mean"}
        for column in COLUMNS[2:]:
            cells = [float(str(other[column])) for other in scored if other["method"] == method]
            defined = [cell for cell in cells if not math.isnan(cell)]
            row[column] = float(np.mean(defined)) if defined else math.nan
        means.append(row)
    return means
