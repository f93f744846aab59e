# SPDX-License-Identifier: Apache-2.0
"""DiT: images of a class; guidance rows in the order cond, null."""

from __future__ import annotations

from ..adapter import Adapter, call_shape, call_timestep, register_adapter
from ..attention import GATED, described
from ..places import block_places
from .patches import patch_tokens

register_adapter(
    "DiTTransformer2DModel",
    Adapter(
        family="dit",
        components=("transformer",),
        branches={1: ("cond",), 2: ("cond", "uncond")},
        shape=call_shape((0, "hidden_states")),
        tokens=patch_tokens,
        timestep=call_timestep(1),
        describe=described("", GATED),
        places=block_places("transformer_blocks", mlp="ff", goes=GATED),
    ),
)
