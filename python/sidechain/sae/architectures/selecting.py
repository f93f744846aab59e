# SPDX-License-Identifier: Apache-2.0
"""What the architectures share that keep a given number of features."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...ops import Codes
from .base import Implementation, Loss
from .dead import auxiliary
from .select import keep_row_largest
from .terms import decoded, squares

if TYPE_CHECKING:
    from ..training.state import TrainState


class Selecting(Implementation):
    """Loss of selected codes: reconstruction, a second one of more features, dead features."""

    def loss(
        self, state: TrainState, weights: dict[str, Tensor], x: Tensor, target: Tensor
    ) -> Loss:
        """Return the loss of rows; see `Implementation.loss`."""
        k, multi = state.schedule.k(state.step), state.train.multi_k
        codes = self.select(state, multi or k, x, weights)
        main = codes if multi is None else first_of(state, codes, k)
        total, error = self.reconstruction(state, weights, main, target)
        if multi is not None:
            second = decoded(state, weights, codes) - target
            total = total + state.train.multi_weight * squares(state, second)
        error = error.detach()
        total = total + auxiliary(state, weights, x, error)
        fired = count_fired(main, state.size)
        return Loss(total, error, fired.sum(), fired, smallest_selected(main))

    def reconstruction(
        self, state: TrainState, w: dict[str, Tensor], codes: Codes, target: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the loss of the codes, and x_hat - target."""
        error = decoded(state, w, codes) - target
        return squares(state, error), error


def first_of(state: TrainState, codes: Codes, k: int) -> Codes:
    """Return the k largest of sorted codes [N, K], over all slices of the features."""
    first = Codes(codes.values[:, :k], codes.indices[:, :k], None)
    return keep_row_largest(first, k, state.mesh)


def count_fired(codes: Codes, size: int) -> Tensor:
    """Return in how many rows each of `size` features is active, [size] int64."""
    counts = torch.zeros(size + 1, dtype=torch.int64, device=codes.values.device)
    place = torch.where(codes.indices < 0, size, codes.indices).flatten().long()
    return counts.index_add_(0, place, (codes.values > 0).flatten().long())[:size]


def smallest_selected(codes: Codes) -> Tensor:
    """Return the smallest positive value, inf if there is none."""
    values = codes.values.detach()
    if not values.numel():
        return torch.full((), torch.inf, dtype=values.dtype, device=values.device)
    return torch.where(values > 0, values, torch.inf).amin()
