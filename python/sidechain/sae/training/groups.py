# SPDX-License-Identifier: Apache-2.0
"""Decode the groups of codes of a fused step: errors, losses and gradients of the values."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...ops import sparse_decode, sparse_decode_loss
from ..model import Codes
from .state import TrainState


class Group(NamedTuple):
    """Codes of the features of this process with the error of their reconstruction.

    Attributes:
        codes: numbered within the slice.
        error: [N', d_out], or [N', P, d_out] of nested prefixes, of which a feature reads that of
            its level; times the weight of the row in the loss.
        dvalues: gradient of the loss in the values.
        row_loss: |e_n|^2 [N'], not weighted.
        weight: factor of the whole code's error within `error`.
        biased: whether `b_dec` is part of the reconstruction.
    """

    codes: Codes
    error: Tensor
    dvalues: Tensor
    row_loss: Tensor
    weight: float
    biased: bool

    @property
    def residual(self) -> Tensor:
        """Target minus what the whole code decodes to, [N', d_out]."""
        whole = self.error if self.error.dim() == 2 else self.error[:, -1]
        return whole / -self.weight

    @property
    def bias_grad(self) -> Tensor:
        """Gradient of `b_dec`, which every prefix adds, [d_out]."""
        return (self.error if self.error.dim() == 2 else self.error[:, 0]).sum(0)


def compared(
    state: TrainState, codes: Codes, target: Tensor, share: float = 1.0, *, biased: bool = True
) -> Group:
    """Decode codes and compare with the target; the weight of the loss goes into the error.

    Args:
        state: its weights.
        codes: numbered within the slice.
        target: [N', d_out].
        share: weight of this group's loss.
        biased: add `b_dec`.
    """
    weight = share * state.row_weight
    w_dec, b_dec = state.weights["w_dec"], state.weights["b_dec"] if biased else None
    if state.mesh.features == 1:
        error, row_loss, dvalues = sparse_decode_loss(
            codes.values, codes.indices, w_dec, b_dec, target, offsets=codes.offsets
        )
        return Group(codes, error.mul_(weight), dvalues.mul_(weight), row_loss, weight, biased)
    # The other slices decode a part of x_hat: the error is known only after their sum.
    part = _Decoded(state, codes)
    error = part.x_hat.sub_(target)
    if b_dec is not None:
        error += b_dec
    row_loss = error.square().sum(1)
    error *= weight
    return Group(codes, error, part.dvalues(error), row_loss, weight, biased)


def nested(state: TrainState, codes: Codes, target: Tensor) -> Group:
    """Decode nested prefixes, whose loss is the mean of theirs (arXiv 2503.17547).

    With e_p the error of the codes below prefix p, the gradient of the loss in what a feature adds
    is w / P (e_p + ... + e_P) for the first prefix p that holds it.

    Args:
        state: its weights, and the prefixes of its config.
        codes: in CSR form, indices ascending within a row.
        target: [N', d_out].
    """
    levels = len(state.config.prefixes)
    weight = state.row_weight / levels
    part = _Decoded(state, by_level(codes, state.prefixes, state.first))
    error = part.x_hat.view(len(target), levels, -1)
    error[:, 0] += state.weights["b_dec"] - target
    for level in range(1, levels):
        error[:, level] += error[:, level - 1]
    row_loss = error[:, -1].square().sum(1)
    error *= weight
    for level in reversed(range(1, levels)):
        error[:, level - 1] += error[:, level]
    dvalues = part.dvalues(error.flatten(0, 1))
    return Group(codes, error, dvalues, row_loss, weight, True)


def by_level(codes: Codes, prefixes: Tensor, first: int) -> Codes:
    """Split the rows of codes by level: row n * P + p holds the codes of row n of level p.

    A code is of the level of the first prefix that holds its feature. What another process keeps
    (index -1) stays with the code before it, so that levels never fall within a row.

    Args:
        codes: in CSR form, indices ascending within a row but for -1.
        prefixes: ascending sizes [P] int64, the last one F, where the codes are.
        first: number of the slice's first feature.

    Raises:
        TypeError: codes of fixed width.
    """
    values, indices, offsets = codes
    if offsets is None:
        raise TypeError("by_level: expected codes in CSR form, got fixed width")
    device, levels, rows = values.device, len(prefixes), len(offsets) - 1
    numbers = torch.arange(rows, device=device)
    row = torch.repeat_interleave(numbers, offsets.diff(), output_size=len(values))
    level = torch.bucketize(indices.clamp(min=0) + first, prefixes, right=True)
    level = torch.where(indices < 0, 0, level)
    place = torch.cummax(row * levels + level, 0).values
    cuts = torch.searchsorted(place, torch.arange(rows * levels + 1, device=device))
    return Codes(values, indices, cuts)


class _Decoded:
    """x_hat without bias, summed over the slices of the features, and its backward pass."""

    def __init__(self, state: TrainState, codes: Codes) -> None:
        with torch.enable_grad():
            self._values = codes.values.detach().requires_grad_()
            self._part = sparse_decode(
                self._values, codes.indices, state.weights["w_dec"], offsets=codes.offsets
            )
        # The backward pass does not read it: it may be written over.
        self.x_hat = state.mesh.sum_features(self._part.detach())

    def dvalues(self, grad: Tensor) -> Tensor:
        """Return <grad[n], w_dec[f]> for every code."""
        return torch.autograd.grad(self._part, self._values, grad)[0]
