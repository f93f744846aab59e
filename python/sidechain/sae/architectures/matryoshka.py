# SPDX-License-Identifier: Apache-2.0
"""Matryoshka: BatchTopK whose nested prefixes each reconstruct the input (arXiv 2503.17547)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...ops import Codes
from .base import ClassLayout, SaeLensLayout
from .batch_topk import BatchTopK
from .terms import decoded, squares

if TYPE_CHECKING:
    from ..training.state import TrainState


class Matryoshka(BatchTopK):
    """Encodes as BatchTopK does; the loss is the mean over prefixes.

    SAELens keeps it as jumprelu with one threshold for all features and has no word to read it.
    """

    saelens = SaeLensLayout("jumprelu", transcoder="jumprelu_transcoder")
    classes = (
        ClassLayout(
            "MatryoshkaBatchTopKSAE",
            {"b_enc": "b_enc", "b_dec": "b_dec", "threshold": "threshold"},
            linear=False,
        ),
    )

    def reconstruction(
        self, state: TrainState, w: dict[str, Tensor], codes: Codes, target: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the mean loss of the codes below each prefix, and x_hat - target of all."""
        number = codes.indices + state.first
        error = w["b_dec"] - target
        total = error.new_zeros(())
        below = 0
        for size in state.config.prefixes:
            inside = (codes.indices >= 0) & (number >= below) & (number < size)
            part = Codes(
                torch.where(inside, codes.values, 0.0),
                torch.where(inside, codes.indices, -1),
                codes.offsets,
            )
            error = error + decoded(state, w, part, bias=False)
            total = total + squares(state, error) / len(state.config.prefixes)
            below = size
        return total, error


IMPLEMENTATION = Matryoshka()
