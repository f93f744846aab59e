# SPDX-License-Identifier: Apache-2.0
"""JumpReLU: a feature is active above a trained threshold of its own (arXiv 2407.14435)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import terms
from .base import ClassLayout, Implementation, Loss, SaeLensLayout

if TYPE_CHECKING:
    from ..model import Sae
    from ..training.state import TrainState
    from ..training.train_config import Schedule

TANH_SCALE = 4.0
# A threshold moves by factors: it would not leave 0.
_LEAST = 1e-6
# Of d / L0, by penalty; see `first_sparsity`.
_SHARES = {"tanh": 0.06, "l0": 0.2}


class JumpRelu(Implementation):
    """v = z [z > t], where t >= 0 learns through a kernel around the step."""

    saelens = SaeLensLayout(
        "jumprelu", "jumprelu", "jumprelu_transcoder", {"threshold": "threshold"}
    )
    classes = (
        ClassLayout(
            "JumpReluAutoEncoder",
            {"b_enc": "b_enc", "b_dec": "b_dec", "threshold": "threshold"},
            linear=False,
            subtracts=False,
        ),
    )

    def own(self, features: int, threshold: float) -> dict[str, Tensor]:
        """Return the thresholds [F]."""
        return {"threshold": torch.full((features,), threshold)}

    def first_sparsity(self, schedule: Schedule, l0: float) -> float:
        """Return a share of d / l0, the squared error that an active value takes away.

        The shares are those at which planted atoms were found (d 64, 8 active).
        """
        return _SHARES[schedule.train.penalty] * schedule.config.width_out / l0

    def limited(self, limit: Tensor) -> dict[str, Tensor]:
        """Return the thresholds; see `Implementation.limited`."""
        return {"threshold": limit.clamp(min=_LEAST)}

    def thresholded(self, sae: Sae) -> tuple[Tensor, Tensor, float | Tensor]:
        """Return the encoder with its thresholds."""
        return sae.w_enc, sae.b_enc, sae.trained_threshold()

    def loss(
        self, state: TrainState, weights: dict[str, Tensor], x: Tensor, target: Tensor
    ) -> Loss:
        """Return |e|^2 and the penalty of the settings, "tanh" or "l0"; see `TrainConfig`."""
        z, threshold = terms.preactivations(weights, x), weights["threshold"]
        width = state.schedule.bandwidth
        values: Tensor = _Jump.apply(z, threshold, width)  # type: ignore[no-untyped-call]
        error = terms.dense(state, weights, values) - target
        if state.train.penalty == "l0":
            count: Tensor = _Step.apply(z, threshold, width)  # type: ignore[no-untyped-call]
            total = terms.penalty(state, count.sum())
        else:
            lengths = terms.lengths(state, weights)
            total = terms.penalty(state, (TANH_SCALE * values * lengths).tanh().sum())
            below = ((threshold - z).relu() * lengths).sum()
            total = total + 0.5 * state.row_weight * state.train.pre_act * below
        return terms.dense_loss(terms.squares(state, error) + total, error, values)

    def scale_encoder_(self, sae: Sae, length: Tensor) -> None:
        """Multiply encoder and thresholds."""
        super().scale_encoder_(sae, length)
        sae.get_parameter("threshold").mul_(length)


class _Jump(torch.autograd.Function):
    """v = z [z > t], t >= 0, with the rectangle kernel for t (arXiv 2407.14435, eq. 11)."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.width = width
        return z * (z > threshold)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        z, threshold = ctx.saved_tensors
        near = ((z - threshold).abs() < ctx.width / 2) * grads[0]
        return (z > threshold) * grads[0], -(threshold / ctx.width) * near.sum(0), None


class _Step(torch.autograd.Function):
    """[z > t] with the rectangle kernel for t (arXiv 2407.14435, eq. 12); none for z."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.width = width
        return (z > threshold).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None]:
        z, threshold = ctx.saved_tensors
        near = ((z - threshold).abs() < ctx.width / 2) * grads[0]
        return None, -near.sum(0) / ctx.width, None


IMPLEMENTATION = JumpRelu()
