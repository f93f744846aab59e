# SPDX-License-Identifier: Apache-2.0
"""PixArt alpha and sigma: cross-attention to T5 with a mask."""

from __future__ import annotations

from ..adapter import Adapter, call_shape, call_timestep, register_adapter
from ..attention import ADDED, GATED, described
from ..places import block_places
from .patches import patch_tokens

register_adapter(
    "PixArtTransformer2DModel",
    Adapter(
        family="pixart",
        components=("transformer",),
        branches={1: ("cond",), 2: ("uncond", "cond")},
        shape=call_shape((0, "hidden_states"), (1, "encoder_hidden_states")),
        tokens=patch_tokens,
        timestep=call_timestep(2),
        describe=described("text", {"self": GATED, "cross": ADDED}),
        places=block_places("transformer_blocks", mlp="ff", goes=GATED),
    ),
)
