# SPDX-License-Identifier: Apache-2.0
"""AudioLDM2: a U-Net whose cross-attention reads the states of GPT-2 or those of T5."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..adapter import Adapter, CallShape, call_shape, call_timestep, register_adapter
from ..attention import ADDED, Attention, read_attention
from ..sites import Site
from .unet import unet_places, unet_tokens


def _describe(name: str, module: nn.Module, denoiser: nn.Module) -> Attention | str:
    if not module.is_cross_attention:
        return read_attention(module, "self", goes=ADDED)
    # Of the transformers behind each resnet the first two read GPT-2, the others T5.
    block_name, _, rest = name.partition(".attentions.")
    block: Any = denoiser.get_submodule(block_name)
    place = int(rest.partition(".")[0]) % len(block.cross_attention_dim)
    source = 0 if place <= 1 else 1
    reads = ("text of GPT-2", "second encoder, T5")[source]
    return read_attention(module, "cross", source, reads=reads, goes=ADDED)


def _context_tokens(site: Site, shape: CallShape) -> int:
    if site.source is None:
        return 0
    # Without a second context the blocks use the first one for all.
    return shape.contexts[min(site.source, len(shape.contexts) - 1)]


register_adapter(
    "AudioLDM2UNet2DConditionModel",
    Adapter(
        family="audioldm2",
        components=("unet",),
        branches={1: ("cond",), 2: ("uncond", "cond")},
        shape=call_shape(
            (0, "sample"), (2, "encoder_hidden_states"), (9, "encoder_hidden_states_1")
        ),
        tokens=unet_tokens,
        context_tokens=_context_tokens,
        timestep=call_timestep(1),
        describe=_describe,
        places=unet_places,
    ),
)
