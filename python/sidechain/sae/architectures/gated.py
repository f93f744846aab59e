# SPDX-License-Identifier: Apache-2.0
"""Gated: one path decides which features are active, another how large they are (2404.16014)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..precision import wide
from . import terms
from .base import ClassLayout, Implementation, Loss, SaeLensLayout

if TYPE_CHECKING:
    from ..model import Sae
    from ..training.state import TrainState


class Gated(Implementation):
    """Active where g = w_enc u + b_gate > 0, with z = exp(r_mag) (w_enc u) + b_enc."""

    saelens = SaeLensLayout("gated", read="gated", tensors={"b_enc": "b_mag"})
    classes = (
        ClassLayout(
            "GatedAutoEncoder",
            {
                "b_enc": "mag_bias",
                "b_dec": "decoder_bias",
                "b_gate": "gate_bias",
                "r_mag": "r_mag",
            },
        ),
    )

    def own(self, features: int, threshold: float) -> dict[str, Tensor]:
        """Return the bias of the gate and the logarithm of the gain."""
        return {"b_gate": torch.zeros(features), "r_mag": torch.zeros(features)}

    def limited(self, limit: Tensor) -> dict[str, Tensor]:
        """Return the bias of the gate; see `Implementation.limited`."""
        return {"b_gate": -limit}

    def thresholded(self, sae: Sae) -> tuple[Tensor, Tensor, float | Tensor]:
        """Return the gate as a threshold: g > 0 iff z > b_enc - exp(r_mag) b_gate.

        Source: arXiv 2404.16014, appendix on weight sharing.
        """
        gain = self.gain(sae)
        limit = (sae.b_enc - gain * sae.get_parameter("b_gate")).detach().clamp(min=0)
        return gain[:, None] * sae.w_enc, sae.b_enc, limit  # gain is float32 at least

    def gain(self, sae: Sae) -> Tensor:
        """Return exp(r_mag)."""
        exponential: Tensor = wide(sae.get_parameter("r_mag")).exp()
        return exponential

    def loss(
        self, state: TrainState, weights: dict[str, Tensor], x: Tensor, target: Tensor
    ) -> Loss:
        """Return the loss of equation 8: the gate learns through a reconstruction of its own.

        That term decodes relu(g) with a decoder that it does not change.
        """
        w = weights
        projected = (x - w["b_pre"]) @ w["w_enc"].T
        gate = projected + w["b_gate"]
        values = (gate > 0) * (w["r_mag"].exp() * projected + w["b_enc"]).relu()
        error = terms.dense(state, w, values) - target
        frozen = {"w_dec": w["w_dec"].detach(), "b_dec": w["b_dec"].detach()}
        gated = gate.relu()
        total = terms.squares(state, error)
        total = total + terms.squares(state, terms.dense(state, frozen, gated) - target)
        total = total + terms.penalty(state, (gated * terms.lengths(state, w)).sum())
        return terms.dense_loss(total, error, values)

    def scaled(self, sae: Sae, factor: Tensor) -> dict[str, Tensor]:
        """Return the gate's bias scaled; the gain is a ratio and stays."""
        own = self.own_of(sae)
        return {**own, "b_gate": own["b_gate"] * factor}

    def scale_encoder_(self, sae: Sae, length: Tensor) -> None:
        """Multiply the gain: the gate does not depend on the size of the values."""
        sae.get_parameter("r_mag").add_(length.log())

    def extended(self, own: Mapping[str, Tensor], extra: int) -> dict[str, Tensor]:
        """Return the mean gain, and a gate's bias of 0 as that of a first feature."""
        found = super().extended(own, extra)
        found["b_gate"][-extra:] = 0
        return found

    def moved(self, sae: Sae, shift: Tensor) -> dict[str, Tensor]:
        """Return both biases moved; see `Implementation.moved`."""
        own = self.own_of(sae)
        return {
            **own,
            "b_enc": (sae.b_enc.detach().double() + own["r_mag"].double().exp() * shift).float(),
            "b_gate": (own["b_gate"].double() + shift).float(),
        }


IMPLEMENTATION = Gated()
