# SPDX-License-Identifier: Apache-2.0
"""Say when a training has collapsed: nothing fires, most is dead, or nothing is explained."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from .train_config import Schedule

#: Below this many active features of a row, above these shares, a dictionary is of no use.
LEAST_L0, MOST_DEAD, MOST_FVU = 0.5, 0.9, 0.95
# Share and number of the steps in which a run may still be like that.
_START, _STEPS = 0.1, 50


def collapsed(metrics: Mapping[str, float], schedule: Schedule) -> str:
    """Return what is wrong and what to change, from the metrics of an interval; "" = nothing.

    The first steps do not count: a tenth of the run, at least 50, and the warm-up.
    """
    train = schedule.train
    start = max(_STEPS, max(_START, train.warmup, train.sparsity_warmup) * train.steps)
    if not metrics or metrics.get("step", 0) <= start:
        return ""
    wrong = []
    if metrics["l0"] < LEAST_L0:
        wrong.append(f"L0 {metrics['l0']:.2g} (expected >= {LEAST_L0:g})")
    if metrics["dead"] > MOST_DEAD:
        wrong.append(f"dead {metrics['dead']:.1%} (expected <= {MOST_DEAD:.0%})")
    if metrics["fvu"] > MOST_FVU:
        wrong.append(f"fvu {metrics['fvu']:.3g} (expected <= {MOST_FVU:g})")
    if not wrong:
        return ""
    return f"the dictionary has collapsed: {', '.join(wrong)}: {_remedy(schedule)}"


def _remedy(schedule: Schedule) -> str:
    train, lr = schedule.train, schedule.base_lr if schedule.train.lr is None else schedule.train.lr
    if train.sparsity is not None and schedule.config.kind.takes("sparsity"):
        return f"lower sparsity, now {train.sparsity:g}, or give l0 in its place"
    if schedule.l0 is not None:
        return f"raise l0, now {schedule.l0:g}, set threshold_init lower, or change lr, now {lr:g}"
    return (
        f"check that the rows vary, train on more tokens, or change lr, now {lr:g}; resample "
        "revives dead features"
    )


class CollapseWatch:
    """Warns once.

    Args:
        schedule: of the run.
    """

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._said = False

    def look(self, metrics: Mapping[str, float] | None) -> None:
        """Look at the metrics of an interval.

        Warns:
            RuntimeWarning: the run has collapsed; it goes on.
        """
        if self._said or metrics is None:
            return
        problem = collapsed(metrics, self._schedule)
        if problem:
            self._said = True
            text = f"Trainer: step {int(metrics['step'])}: {problem}"
            warnings.warn(text, RuntimeWarning, stacklevel=2)
