# SPDX-License-Identifier: Apache-2.0
"""LongCat-AudioDiT: one denoiser call for each branch."""

from __future__ import annotations

from ..adapter import Adapter, CallShape, call_shape, call_timestep, register_adapter
from ..attention import ADDED, GATED, with_context
from ..places import block_places
from ..sites import Site


def _tokens(site: Site, shape: CallShape) -> int:
    return shape.latent[0]


register_adapter(
    "LongCatAudioDiTTransformer",
    Adapter(
        family="longcat",
        components=("transformer",),
        branches={},
        calls=("cond", "uncond"),
        shape=call_shape((0, "hidden_states"), (1, "encoder_hidden_states")),
        tokens=_tokens,
        timestep=call_timestep(3, scale=1000.0),
        describe=with_context("cross_attn", reads="text", goes={"self": GATED, "cross": ADDED}),
        places=block_places("blocks", mlp="ffn", goes=GATED),
    ),
)
