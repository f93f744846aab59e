# SPDX-License-Identifier: Apache-2.0
"""Terms that the losses of several architectures are made of."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...ops import Codes, sparse_decode
from .base import Loss

if TYPE_CHECKING:
    from ..training.state import TrainState


def squares(state: TrainState, error: Tensor) -> Tensor:
    """Return w |e|^2 / 2 summed over rows, w the weight of a row in the batch."""
    return 0.5 * state.row_weight * error.square().sum()


def penalty(state: TrainState, value: Tensor) -> Tensor:
    """Return a penalty on activations, with the coefficient of this step."""
    coefficient = state.sparsity()
    if isinstance(coefficient, Tensor):
        coefficient = coefficient.to(value.dtype)
    return 0.5 * state.row_weight * coefficient * value


def lengths(state: TrainState, w: dict[str, Tensor]) -> Tensor:
    """Return the norms of the decoder rows; ones where they are kept at one (projected)."""
    if state.config.unit_norm:
        return torch.ones_like(w["b_enc"])
    return w["w_dec"].norm(dim=1)


def preactivations(w: dict[str, Tensor], x: Tensor) -> Tensor:
    """Return w_enc (x - b_pre) + b_enc [n, F']."""
    return (x - w["b_pre"]) @ w["w_enc"].T + w["b_enc"]


def dense(state: TrainState, w: dict[str, Tensor], values: Tensor) -> Tensor:
    """Decode dense values [n, F']."""
    return state.mesh.sum_features_once(values @ w["w_dec"]) + w["b_dec"]


def decoded(state: TrainState, w: dict[str, Tensor], codes: Codes, *, bias: bool = True) -> Tensor:
    """Decode sparse codes."""
    part = sparse_decode(codes.values, codes.indices, w["w_dec"], offsets=codes.offsets)
    whole = state.mesh.sum_features_once(part)
    return whole + w["b_dec"] if bias else whole


def dense_loss(total: Tensor, error: Tensor, values: Tensor) -> Loss:
    """Return the loss of an architecture that looks at every feature."""
    fired = (values > 0).sum(0)
    nothing = torch.full((), torch.inf, dtype=error.dtype, device=error.device)
    return Loss(total, error.detach(), fired.sum(), fired, nothing)
