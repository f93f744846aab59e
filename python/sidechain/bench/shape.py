# SPDX-License-Identifier: Apache-2.0
"""Sizes of a dictionary's training step, shared by the sections for ops and for training."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """Batches of N tokens of width d, F features, k of them active."""

    tokens: int
    width: int
    features: int
    k: int

    @property
    def name(self) -> str:
        """Readable id."""
        return f"N{self.tokens}-d{self.width}-F{self.features}-k{self.k}"

    @property
    def flops(self) -> int:
        """Operations that no method avoids: the encoder's product, and four sparse ones."""
        return 2 * self.tokens * self.width * (self.features + 4 * self.k)

    @property
    def moved(self) -> int:
        """Bytes that Adam alone moves: two matrices and their state in float32, in and out."""
        return 2 * 2 * 3 * 4 * self.features * self.width
