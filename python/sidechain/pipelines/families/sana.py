# SPDX-License-Identifier: Apache-2.0
"""Sana: linear self-attention, plain cross-attention to Gemma with a mask."""

from __future__ import annotations

from torch import nn

from ..adapter import Adapter, call_shape, register_adapter
from ..attention import ADDED, GATED, Attention, read_attention
from ..places import block_places
from .patches import patch_tokens


def _describe(name: str, module: nn.Module, denoiser: nn.Module) -> Attention | str:
    if module.is_cross_attention:
        return read_attention(module, "cross", reads="text", goes=ADDED)
    return read_attention(module, "self", note="linear attention", goes=GATED)


register_adapter(
    "SanaTransformer2DModel",
    Adapter(
        family="sana",
        components=("transformer",),
        branches={1: ("cond",), 2: ("uncond", "cond")},
        shape=call_shape((0, "hidden_states"), (1, "encoder_hidden_states")),
        tokens=patch_tokens,
        # The pipeline multiplies timesteps by a number of the model's config, which the arguments
        # of a call do not hold.
        timestep=None,
        describe=_describe,
        places=block_places("transformer_blocks", mlp="ff", goes=GATED),
    ),
)
