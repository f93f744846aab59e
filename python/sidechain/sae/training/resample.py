# SPDX-License-Identifier: Apache-2.0
"""Resampling: dead features get a new direction from rows with a large error.

Source: Bricken et al. 2023, "Towards Monosemanticity", appendix on neuron resampling.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..architectures.registry import implementation
from ..initialise import mix
from .rows import Rows
from .state import TrainState

ENCODER_SHARE = 0.2
"""Length of a new encoder row, relative to the mean length of the living ones."""


def resample(state: TrainState, rows: Rows, row_loss: Tensor) -> int:
    """Restart the dead features on rows of the batch drawn in proportion to their loss squared.

    The decoder row becomes the direction of the row's target minus b_dec, the encoder row that of
    its input minus b_pre, scaled; the limit is a first one, other biases and the running statistics
    become 0. More dead features
    than rows: the rest stays for the next time. The draw depends on the seed and the step alone,
    and on every process of a mesh it is the same.

    Args:
        state: changed in place.
        rows: this process's rows of the batch just trained on.
        row_loss: |e_n|^2 of each [N'].

    Returns:
        Number of features restarted, over all processes.
    """
    x, target = state.normalised(rows)
    x, target = state.mesh.gather_rows(x), state.mesh.gather_rows(target)
    loss = state.mesh.gather_rows(row_loss).cpu().double()
    mask = state.mesh.gather_features(state.dead_mask())
    dead = mask.nonzero()[:, 0].cpu()
    count = min(len(dead), int((loss > 0).sum()))
    if not count:
        return 0
    generator = torch.Generator().manual_seed(mix(state.train.seed, 2, state.step))
    drawn = torch.multinomial(loss.square(), count, generator=generator).to(x.device)
    length = _mean_length(state, mask)
    mine = (dead[:count] >= state.first) & (dead[:count] < state.first + state.size)
    place = (dead[:count][mine] - state.first).to(x.device)
    picked = drawn[mine.to(x.device)]
    weights = state.weights
    weights["w_dec"][place] = _unit(target[picked] - weights["b_dec"])
    weights["w_enc"][place] = _unit(x[picked] - state.b_pre) * length * ENCODER_SHARE
    kind, limit = implementation(state.config.architecture), state.schedule.first_limit
    spread = weights["w_enc"][place].norm(dim=1)  # of rows with E|y|^2 = d
    own = kind.own(len(place), limit) | kind.limited(limit * spread)
    weights["b_enc"][place] = 0.0
    for name, first in own.items():
        if first.dim():
            weights[name][place] = first.to(weights[name])
    for name, statistics in state.adam.items():
        if name != "b_dec":
            for statistic in statistics:
                statistic[place] = 0.0
    state.last_fired[place] = state.step
    return count


def _mean_length(state: TrainState, dead: Tensor) -> Tensor:
    alive = ~dead[state.first : state.first + state.size]
    length = state.weights["w_enc"].norm(dim=1)
    sums = torch.stack([torch.where(alive, length, 0.0).sum(), alive.sum().to(length.dtype)])
    total, count = state.mesh.sum_features(sums).unbind()
    return torch.where(count > 0, total / count.clamp(min=1), 1.0)


def _unit(t: Tensor) -> Tensor:
    return t / t.norm(dim=1, keepdim=True).clamp(min=1e-30)
