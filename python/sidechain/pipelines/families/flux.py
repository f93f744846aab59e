# SPDX-License-Identifier: Apache-2.0
"""Flux: joint attention in double blocks, attention over text and image in single blocks."""

from __future__ import annotations

from torch import nn

from ..adapter import Adapter, CallShape, call_shape, call_timestep, register_adapter
from ..attention import Attention, read_attention
from ..sites import Site


def _describe(name: str, module: nn.Module, denoiser: nn.Module) -> Attention | str:
    if getattr(module, "added_kv_proj_dim", None) is not None:
        return read_attention(module, "joint", note="output for the image")
    # A single block projects attention and MLP together, so its attention has no `to_out`.
    return read_attention(module, "self", note="text tokens first; before the block's proj_out")


def _tokens(site: Site, shape: CallShape) -> int:
    image = shape.latent[0]  # latents come packed to tokens
    return image if site.kind == "joint" else shape.contexts[0] + image


register_adapter(
    "FluxTransformer2DModel",
    Adapter(
        family="flux",
        components=("transformer",),
        branches={},
        # Guidance is distilled into the model; only true guidance makes the second call.
        calls=("cond", "uncond"),
        shape=call_shape((0, "hidden_states"), (1, "encoder_hidden_states")),
        tokens=_tokens,
        timestep=call_timestep(3, scale=1000.0),
        describe=_describe,
    ),
)
