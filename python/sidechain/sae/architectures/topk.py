# SPDX-License-Identifier: Apache-2.0
"""TopK: the k largest positive features of every token (arXiv 2406.04093)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from ...ops import Codes, Encoder, topk_encode
from .base import ClassLayout, SaeLensLayout
from .select import keep_row_largest
from .selecting import Selecting

if TYPE_CHECKING:
    from ..model import Sae
    from ..training.state import TrainState


class TopK(Selecting):
    """Features of a token are compared with each other, in training and afterwards."""

    saelens = SaeLensLayout("topk", read="topk")
    classes = (ClassLayout("AutoEncoderTopK", {"b_enc": "encoder.bias", "b_dec": "b_dec"}),)
    sparsify = "topk"

    def encode(self, sae: Sae, y: Tensor, **options: Any) -> Codes:
        """Return the k largest of every row [N, k]."""
        return topk_encode(
            y, Encoder(sae.w_enc, sae.b_enc, sae.b_pre), k=sae.config.k, mode="topk", **options
        )

    def thresholded(self, sae: Sae) -> tuple[Tensor, Tensor, float | Tensor]:
        """Refuse: no threshold says which features of a token are active."""
        raise ValueError("Sae: expected an architecture with a threshold, got topk")

    def select(
        self, state: TrainState, k: int, x: Tensor, weights: dict[str, Tensor], **options: Any
    ) -> Codes:
        """Return the codes of own features among the k largest of each row."""
        w = weights
        codes = topk_encode(
            x, Encoder(w["w_enc"], w["b_enc"], w["b_pre"]), k=min(k, state.size), **options
        )
        return keep_row_largest(codes, k, state.mesh)


IMPLEMENTATION = TopK()
