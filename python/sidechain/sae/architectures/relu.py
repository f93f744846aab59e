# SPDX-License-Identifier: Apache-2.0
"""ReLU with an L1 penalty on the activations (Bricken et al. 2023)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from . import terms
from .base import ClassLayout, Implementation, Loss, SaeLensLayout

if TYPE_CHECKING:
    from ..model import Sae
    from ..training.state import TrainState


class Relu(Implementation):
    """Every positive feature is active."""

    saelens = SaeLensLayout("standard", read="standard", transcoder="transcoder")
    classes = (
        ClassLayout("AutoEncoder", {"b_enc": "encoder.bias", "b_dec": "bias"}, unit_norm=True),
        ClassLayout(
            "AutoEncoderNew", {"b_enc": "encoder.bias", "b_dec": "decoder.bias"}, subtracts=False
        ),
    )

    def limited(self, limit: Tensor) -> dict[str, Tensor]:
        """Return the bias; see `Implementation.limited`."""
        return {"b_enc": -limit}

    def thresholded(self, sae: Sae) -> tuple[Tensor, Tensor, float | Tensor]:
        """Return the encoder as it is."""
        return sae.w_enc, sae.b_enc, 0.0

    def loss(
        self, state: TrainState, weights: dict[str, Tensor], x: Tensor, target: Tensor
    ) -> Loss:
        """Return |e|^2 + sparsity sum_f v_f |w_dec[f]|."""
        values = terms.preactivations(weights, x).relu()
        error = terms.dense(state, weights, values) - target
        size = (values * terms.lengths(state, weights)).sum()
        total = terms.squares(state, error) + terms.penalty(state, size)
        return terms.dense_loss(total, error, values)


IMPLEMENTATION = Relu()
