# SPDX-License-Identifier: Apache-2.0
"""A TopK dictionary in plain torch, as one writes it: dense, autocast, compiled, embedding_bag."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..shape import Shape
from .common import LR, Start


class DenseTrainer:
    """Dense TopK dictionary: relu, topk, scatter, dense decoder; fused Adam; unit decoder rows.

    Args:
        shape: N, d, F, k.
        start: weights to begin with.
        precision: "fp32", or "bf16" for autocast with float32 master weights.
        compiled: forward and backward through torch.compile.
        bag: decode with embedding_bag instead of a dense product.
    """

    def __init__(
        self,
        shape: Shape,
        start: Start,
        *,
        precision: str = "fp32",
        compiled: bool = False,
        bag: bool = False,
    ) -> None:
        device = start.w_enc.device
        self.k, self.device, self.precision = shape.k, device.type, precision
        self.w_enc = nn.Parameter(start.w_enc.clone())
        self.w_dec = nn.Parameter(start.w_dec.clone())
        self.b_enc = nn.Parameter(torch.zeros(shape.features, device=device))
        self.b_dec = nn.Parameter(torch.zeros(shape.width, device=device))
        weights = [self.w_enc, self.w_dec, self.b_enc, self.b_dec]
        self.adam = torch.optim.Adam(weights, lr=LR, fused=True)
        forward = self._bag if bag else self._dense
        self.forward: Callable[[Tensor], Tensor] = (
            torch.compile(forward, dynamic=False) if compiled else forward
        )

    def _codes(self, x: Tensor) -> Any:
        z = nn.functional.linear(x - self.b_dec, self.w_enc, self.b_enc)
        return z, z.topk(self.k, dim=-1, sorted=False)

    def _dense(self, x: Tensor) -> Tensor:
        z, top = self._codes(x)
        codes = torch.zeros_like(z).scatter(-1, top.indices, top.values.relu())
        return codes @ self.w_dec + self.b_dec

    def _bag(self, x: Tensor) -> Tensor:
        _, top = self._codes(x)
        values = top.values.relu().to(self.w_dec.dtype)
        return self.b_dec + nn.functional.embedding_bag(
            top.indices, self.w_dec, per_sample_weights=values, mode="sum"
        )

    def _autocast(self) -> Any:
        narrow = self.precision == "bf16"
        return torch.autocast(self.device, torch.bfloat16) if narrow else nullcontext()

    def step(self, x: Tensor) -> None:
        """Train on one batch."""
        with self._autocast():
            loss = (self.forward(x).float() - x).square().sum(-1).mean()
        self.adam.zero_grad(set_to_none=True)
        loss.backward()
        with torch.no_grad():
            w, grad = self.w_dec, self.w_dec.grad
            assert grad is not None
            grad -= (grad * w).sum(1, keepdim=True) * w
            self.adam.step()
            w.div_(w.norm(dim=1, keepdim=True))

    def reconstruct(self, x: Tensor) -> Tensor:
        """Return the reconstruction in float32."""
        with torch.no_grad():
            return self._bag(x)
