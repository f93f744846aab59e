# SPDX-License-Identifier: Apache-2.0
"""One training step, by whichever path the settings choose."""

from __future__ import annotations

from .autograd_step import autograd_step
from .fused_step import fused_step
from .resample import resample
from .rows import Rows
from .state import TrainState
from .train_metrics import Outcome


def train_step(state: TrainState, rows: Rows) -> Outcome:
    """Train on one batch.

    Args:
        state: changed in place.
        rows: this process's rows of the batch, `state.mesh.rows(batch)`.

    Returns:
        Loss of each row, as tensors: nothing here waits for the device, but for the lists of a
        batch (batch_topk, matryoshka), whose size the host has to know, once a step; the update of
        the dead mask every `dead_every` steps; and a resampling.
    """
    if state.schedule.updates_dead(state.step):
        state.update_dead()
    outcome = (fused_step if state.schedule.fused else autograd_step)(state, rows)
    if state.schedule.resamples(state.step - 1):
        resample(state, rows, outcome.row_loss)
    return outcome
