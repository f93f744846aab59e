# SPDX-License-Identifier: Apache-2.0
"""Stable Audio 3: differential attention in two classes of its own."""

from __future__ import annotations

from ..adapter import Adapter, CallShape, call_shape, call_timestep, register_adapter
from ..attention import ADDED, GATED, with_context
from ..places import block_places
from ..sites import Site


def _tokens(site: Site, shape: CallShape) -> int:
    config = site.config
    # Learnt memory tokens stand in front.
    return int(config["num_memory_tokens"]) + shape.latent[1] // int(config["patch_size"])


register_adapter(
    "StableAudio3DiTModel",
    Adapter(
        family="stable_audio3",
        components=("transformer",),
        # Distilled models run without guidance.
        branches={1: ("cond",), 2: ("uncond", "cond")},
        shape=call_shape((0, "hidden_states"), (2, "encoder_hidden_states")),
        tokens=_tokens,
        timestep=call_timestep(1),
        describe=with_context(
            "cross_attn", reads="text and durations", goes={"self": GATED, "cross": ADDED}
        ),
        places=block_places("transformer_blocks", mlp="ff", goes=GATED),
    ),
)
