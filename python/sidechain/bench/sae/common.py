# SPDX-License-Identifier: Apache-2.0
"""The common start of all trainers in the comparison: shape, data, weights, settings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..shape import Shape

LR = 1e-3
NOISE = 0.05  # of a batch's deviation
SPARE = 4  # true directions per feature of width d: the data is in superposition


class Start(NamedTuple):
    """Initial weights of all trainers: tied, decoder rows of length 1, biases 0."""

    w_enc: Tensor  # [F, d]
    w_dec: Tensor  # [F, d]


class Trainer(Protocol):
    """One trainer with its own weights."""

    def step(self, x: Tensor) -> None:
        """Train on one batch [N, d]: forward, backward, Adam."""

    def reconstruct(self, x: Tensor) -> Tensor:
        """Return the reconstruction of [N, d], without gradients."""


def start(shape: Shape, device: str, seed: int = 0) -> Start:
    """Draw random unit rows; the encoder is half of them, so that the first step is stable."""
    g = torch.Generator(device).manual_seed(seed)
    w = torch.randn(shape.features, shape.width, generator=g, device=device)
    w /= w.norm(dim=1, keepdim=True)
    return Start(0.5 * w, w)


class Batches:
    """Training data: sparse sums of random directions with noise, mean 0.

    Mean 0, since not every package has a bias that could learn it.

    Args:
        shape: of the batches.
        device: they are made on.
        seed: of the directions and of every batch.
    """

    def __init__(self, shape: Shape, device: str, seed: int = 1) -> None:
        self.shape, self.device, self.seed = shape, device, seed
        g = torch.Generator(device).manual_seed(seed)
        directions = torch.randn(SPARE * shape.width, shape.width, generator=g, device=device)
        self._directions = directions / directions.norm(dim=1, keepdim=True)

    def __getitem__(self, number: int) -> Tensor:
        """Return batch number `i`, [N, d] float32, the same every time."""
        shape, here = self.shape, self.device
        g = torch.Generator(here).manual_seed(1_000_003 * self.seed + number)
        many = (shape.tokens, max(2, shape.k // 2))
        pick = torch.randint(len(self._directions), many, generator=g, device=here)
        size = torch.empty(many, device=here).exponential_(generator=g)
        size *= torch.randint(0, 2, many, generator=g, device=here) * 2 - 1
        x = torch.nn.functional.embedding_bag(
            pick, self._directions, per_sample_weights=size, mode="sum"
        )
        x += NOISE * x.std() * torch.randn(x.shape, generator=g, device=here)
        return x

    def __iter__(self) -> Iterator[Tensor]:
        """Batches 0, 1, ... without end."""
        number = 0
        while True:
            yield self[number]
            number += 1


def fvu(trainer: Trainer, x: Tensor) -> float:
    """Fraction of the variance of x that a trainer does not explain."""
    with torch.no_grad():
        error = (trainer.reconstruct(x).float() - x).double().square().sum()
        total = (x - x.mean(0)).double().square().sum()
    return float(error / total)
