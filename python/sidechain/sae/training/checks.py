# SPDX-License-Identifier: Apache-2.0
"""Checks that there is something to learn: of rows before a run, of a state before it is kept."""

from __future__ import annotations

from collections.abc import Sequence

from ..._errors import InputError
from ...store import RunningStatistics, Statistics
from .state import TrainState

#: Of the mean square: far above the rounding of sums in float64 (1e-32), far below the variance of
#: a million rows in which one element differs by one unit of float32 (1e-23).
_ROUNDING = 1e-28


def check_varying(statistics: Statistics, kind: str) -> None:
    """Refuse rows that do not vary: no scale fits them, and there is nothing to learn.

    Columns that do not vary are fine as long as another one does.

    Args:
        statistics: of the rows that a normaliser is fitted to.
        kind: "step", "global" or "none"; with "step" the rows of every step have to vary, with
            "none" nothing is fitted and nothing looked at.

    Raises:
        InputError: all rows (of a step) are equal, or a step has one row.
    """
    if kind == "none":
        return
    steps: Sequence[int | None] = [None]
    if kind == "step" and statistics.cells:
        steps = sorted({step for step, _ in statistics.cells})
    for step in steps:
        known = statistics.total(None if step is None else [step])
        if known.count == 0 or _varies(known):
            continue
        where = "" if step is None else f" at step {step}"
        count = "one" if known.count == 1 else f"{known.count} constant ones"
        raise InputError(
            f"train: expected rows that vary [they are normalised by their variance], got {count}"
            f"{where}"
        )


def check_selected(state: TrainState) -> None:
    """Refuse to keep a dictionary in which no feature was ever selected.

    Its threshold follows what batches select; where rows do not vary (without a normaliser nothing
    looks at them before) or are zero, it is NaN to the end, and no row can be encoded.

    Raises:
        InputError: so it is after the steps done.
    """
    threshold = state.weights.get("threshold")
    if state.step == 0 or threshold is None or threshold.dim() or not bool(threshold.isnan()):
        return
    raise InputError(
        f"train: expected rows that vary [{state.config.architecture} selects features by them], "
        f"got rows of which no feature was selected in {state.step} steps"
    )


def _varies(known: RunningStatistics) -> bool:
    width = max(1, len(known.mean))
    mean_square = known.norm_squares / known.count / width
    # NaN is not constant; whoever looks for bad rows names the row.
    return not float(known.variance.mean()) <= _ROUNDING * mean_square
