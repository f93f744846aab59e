# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion 3: joint attention over image and text; some blocks add one of the image."""

from __future__ import annotations

from torch import nn

from ..adapter import Adapter, call_shape, call_timestep, register_adapter
from ..attention import GATED, Attention, read_attention
from ..places import block_places
from .patches import patch_tokens


def _describe(name: str, module: nn.Module, denoiser: nn.Module) -> Attention | str:
    # `is_cross_attention` is False for both.
    if getattr(module, "added_kv_proj_dim", None) is None:
        return read_attention(module, "self", goes=GATED)
    return read_attention(module, "joint", note="output for the image", reads="text", goes=GATED)


register_adapter(
    "SD3Transformer2DModel",
    Adapter(
        family="sd3",
        components=("transformer",),
        branches={1: ("cond",), 2: ("uncond", "cond")},
        shape=call_shape((0, "hidden_states"), (1, "encoder_hidden_states")),
        tokens=patch_tokens,
        timestep=call_timestep(3),
        describe=_describe,
        # A block puts out (text, image).
        places=block_places(
            "transformer_blocks", mlp="ff", element=1, goes=GATED, other=("ff_context",)
        ),
    ),
)
