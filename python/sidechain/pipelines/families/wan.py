# SPDX-License-Identifier: Apache-2.0
"""Wan: videos, one denoiser call for each branch."""

from __future__ import annotations

from ..adapter import Adapter, CallShape, call_shape, call_timestep, register_adapter
from ..attention import ADDED, GATED, described
from ..places import block_places
from ..sites import Site
from .patches import patch_tokens


def _context_tokens(site: Site, shape: CallShape) -> int:
    # With a first image its tokens and those of the text are one context.
    return sum(shape.contexts) if site.kind == "cross" else 0


register_adapter(
    "WanTransformer3DModel",
    Adapter(
        family="wan",
        components=("transformer",),
        branches={},
        calls=("cond", "uncond"),
        shape=call_shape(
            (0, "hidden_states"), (2, "encoder_hidden_states"), (3, "encoder_hidden_states_image")
        ),
        tokens=patch_tokens,
        context_tokens=_context_tokens,
        timestep=call_timestep(1),
        # Image to video: the tokens of the first image go before those of the text.
        describe=described("text", {"self": GATED, "cross": ADDED}),
        places=block_places("blocks", mlp="ffn", goes=GATED),
        excludes=("transformer_2",),
    ),
)
