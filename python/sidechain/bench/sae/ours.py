# SPDX-License-Identifier: Apache-2.0
"""Our trainer, on the start and the settings of the comparison."""

from __future__ import annotations

import torch
from torch import Tensor

from sidechain.sae import Normaliser, SaeConfig
from sidechain.sae.training.rows import Rows
from sidechain.sae.training.state import TrainState
from sidechain.sae.training.step import train_step
from sidechain.sae.training.train_config import TrainConfig

from ..shape import Shape
from .common import LR, Start


class OurTrainer:
    """`sidechain.sae`'s step as `sidechain sae train` runs it, without normalisation and AuxK.

    Args:
        shape: N, d, F, k.
        start: weights to begin with.
        path: "fused" or "autograd".
        precision: of the encoder.
    """

    def __init__(
        self, shape: Shape, start: Start, *, path: str = "fused", precision: str = "fp32"
    ) -> None:
        steps = 10**6
        eps = 1e-8 / shape.width  # our loss is a mean over the width, that of the others a sum
        self.k = shape.k
        self.state = TrainState(
            SaeConfig(shape.width, shape.features, "topk", shape.k),
            TrainConfig(
                tokens=steps * shape.tokens, batch=shape.tokens, lr=LR, warmup=0.0,
                decay="constant", normalise="none", bias_init="zero", aux_k=0, path=path,
                precision=precision, eps=eps,
            ),
            Normaliser(torch.zeros(1, shape.width), torch.ones(1)),
            device=start.w_enc.device,
        )  # fmt: skip
        self.state.weights["w_enc"].copy_(start.w_enc)
        self.state.weights["w_dec"].copy_(start.w_dec)

    def step(self, x: Tensor) -> None:
        """Train on one batch."""
        train_step(self.state, Rows(x))

    def reconstruct(self, x: Tensor) -> Tensor:
        """Return the reconstruction in float32."""
        w = self.state.weights
        with torch.no_grad():
            z = torch.addmm(w["b_enc"], x - w["b_dec"], w["w_enc"].T)
            top = z.topk(self.k, dim=-1)
            return w["b_dec"] + torch.nn.functional.embedding_bag(
                top.indices, w["w_dec"], per_sample_weights=top.values.relu(), mode="sum"
            )
