# SPDX-License-Identifier: Apache-2.0
"""Metrics of a run, summed on the device and read one interval late."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .state import TrainState

_NAMES = ("squares", "target_squares", "rows", "active")


class Outcome(NamedTuple):
    """Result of a step.

    Attributes:
        row_loss: |e_n|^2 of each own row [N'].
        target: of these rows [N', d_out], normalised.
        active: number of active own features in these rows.
    """

    row_loss: Tensor
    target: Tensor
    active: Tensor


class Metrics:
    """Sums since the last reading.

    `add` only adds tensors; `read` starts a copy to the host and returns what the reading before
    it copied, so that no step waits for the device.
    """

    def __init__(self, state: TrainState) -> None:
        self._state = state
        self.totals = torch.zeros(len(_NAMES), dtype=torch.float64, device=state.device)
        self.target_sum = torch.zeros(
            state.config.width_out, dtype=torch.float64, device=state.device
        )
        self._pending: tuple[int, Tensor, Any] | None = None

    def add(self, outcome: Outcome) -> None:
        """Add a step."""
        target = outcome.target
        self.totals += torch.stack(
            [
                outcome.row_loss.sum(dtype=torch.float64),
                target.square().sum(dtype=torch.float64),
                torch.full((), len(target), dtype=torch.float64, device=target.device),
                outcome.active.double(),
            ]
        )
        self.target_sum += target.sum(0, dtype=torch.float64)

    def read(self) -> dict[str, float] | None:
        """Start reading the sums and return the reading before.

        Every process of a mesh has to call it.

        Returns:
            step, tokens, fvu, l0, dead (share), lr, k or sparsity; None at the first call.
        """
        before = self.flush()
        state = self._state
        computed = self._compute()
        on_gpu = computed.device.type == "cuda"
        host = torch.empty(computed.shape, dtype=computed.dtype, pin_memory=on_gpu)
        host.copy_(computed, non_blocking=True)
        copied = torch.cuda.current_stream(computed.device).record_event() if on_gpu else None
        self._pending = (state.step, host, copied)
        self.totals.zero_()
        self.target_sum.zero_()
        return before

    def flush(self) -> dict[str, float] | None:
        """Return the reading under way, waiting for it, and for no step after it."""
        if self._pending is None:
            return None
        step, host, copied = self._pending
        if copied is not None:
            copied.synchronize()
        self._pending = None
        fvu, l0, dead, sparsity = host.tolist()
        schedule = self._state.schedule
        made = {"step": step, "tokens": step * self._state.train.batch, "fvu": fvu, "l0": l0}
        made |= {"dead": dead, "lr": schedule.lr(step - 1)}
        if self._state.config.kind.takes("k"):
            made["k"] = schedule.k(step - 1)
        else:
            made["sparsity"] = sparsity
        return made

    def _compute(self) -> Tensor:
        state = self._state
        sums = state.mesh.sum_data(torch.cat([self.totals, self.target_sum]))
        squares, target_squares, rows, active = sums[: len(_NAMES)].unbind()
        active = state.mesh.sum_features(active.clone())
        mean = sums[len(_NAMES) :] / rows
        variance = target_squares - rows * mean.square().sum()
        dead = state.mesh.sum_features(state.dead_mask().sum())
        found = [squares / variance, active / rows, dead / state.config.features]
        return torch.stack([*found, self._sparsity(found[0])])

    def _sparsity(self, like: Tensor) -> Tensor:
        """Return the coefficient of a penalty: of the last step, or of the next if it moves."""
        state = self._state
        if state.control is not None:
            return state.control.coefficient
        return torch.full_like(like, state.schedule.sparsity(state.step - 1))
