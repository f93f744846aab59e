# SPDX-License-Identifier: Apache-2.0
"""A training step through autograd: any architecture, dense gradients, tile by tile."""

from __future__ import annotations

import torch
from torch import Tensor

from ..architectures.base import Loss
from ..architectures.registry import implementation
from . import optimiser
from .rows import Rows
from .state import TrainState
from .train_metrics import Outcome

# Elements of [rows, F] held at a time by architectures that look at every feature.
_HELD = 1 << 26


def autograd_step(state: TrainState, rows: Rows) -> Outcome:
    """Train on one batch: gradients by autograd, then AdamW on all weights.

    Args:
        state: changed in place; its `step` is the number of this step, from 0.
        rows: this process's rows of the batch.
    """
    x, target = state.normalised(rows)
    leaves = {n: state.weights[n].detach().requires_grad_() for n in state.trained}
    leaves["b_pre"] = state.b_pre.detach().requires_grad_()
    trained = [*state.trained, "b_pre"]
    grads = {n: torch.zeros_like(leaves[n]) for n in trained}
    kind = implementation(state.config.architecture)
    parts: list[Loss] = []
    for tile in _tiles(state, len(x)):
        part = kind.loss(state, leaves, x[tile], target[tile])
        found = torch.autograd.grad(part.total, [leaves[n] for n in trained], allow_unused=True)
        for name, grad in zip(trained, found, strict=True):
            if grad is not None:
                grads[name] += grad
        parts.append(part._replace(total=part.total.detach()))
    fired = state.mesh.sum_data(torch.stack([p.fired for p in parts]).sum(0))
    _share(state, grads)
    state.step += 1
    state.last_fired.masked_fill_(fired > 0, state.step)
    optimiser.apply(state, grads)
    if state.config.kind.threshold == "batch":
        follow_threshold(state, torch.stack([p.smallest for p in parts]).amin())
    error = torch.cat([p.error for p in parts])
    active = torch.stack([p.active for p in parts]).sum()
    if state.control is not None:
        state.control.follow(state.mesh.sum_all(active.clone()), state.train.batch)
    return Outcome(error.square().sum(1), target, active)


def _tiles(state: TrainState, rows: int) -> list[slice]:
    """Cut the rows so that dense architectures hold a bounded array; selection needs them whole."""
    if state.config.kind.selects:
        return [slice(0, rows)]
    size = max(1, _HELD // state.size)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _share(state: TrainState, grads: dict[str, Tensor]) -> None:
    """Sum gradients over the processes; add that of `b_pre` to `b_dec` where they are one."""
    pre = grads.pop("b_pre")
    if state.fixed_b_pre is None:
        grads["b_dec"] += state.mesh.sum_features(pre)
    for grad in grads.values():
        state.mesh.sum_data(grad)


def follow_threshold(state: TrainState, smallest: Tensor) -> None:
    """Move the running threshold towards the smallest value that this batch selected."""
    state.smallest = smallest
    smallest = state.mesh.minimum(smallest)
    threshold = state.weights["threshold"]
    before = torch.where(threshold.isnan(), smallest, threshold)
    moved = torch.lerp(smallest, before, state.schedule.threshold_decay(state.step - 1))
    threshold.copy_(torch.where(smallest.isinf(), threshold, moved))
