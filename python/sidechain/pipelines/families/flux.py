# SPDX-License-Identifier: Apache-2.0
"""Flux: joint attention in double blocks, attention over text and image in single blocks."""

from __future__ import annotations

from torch import nn

from ..adapter import Adapter, CallShape, call_shape, call_timestep, register_adapter
from ..attention import GATED, HOLDS, PROJECTED, Attention, read_attention
from ..places import Place, block_places, output_width
from ..sites import Site


def _describe(name: str, module: nn.Module, denoiser: nn.Module) -> Attention | str:
    if getattr(module, "added_kv_proj_dim", None) is not None:
        return read_attention(
            module, "joint", note="output for the image", reads="text", goes=GATED
        )
    # A single block projects attention and MLP together, so its attention has no `to_out`.
    return read_attention(module, "self", note="text tokens first", goes=PROJECTED)


def _tokens(site: Site, shape: CallShape) -> int:
    image = shape.latent[0]  # latents come packed to tokens
    # Inside of single blocks text and image are one sequence.
    both = site.name.startswith("single_transformer_blocks") and site.kind != "block"
    return shape.contexts[0] + image if both else image


# Both kinds of blocks put out (text, image).
_double = block_places("transformer_blocks", mlp="ff", element=1, goes=GATED, other=("ff_context",))


def _places(name: str, module: nn.Module, denoiser: nn.Module) -> Place | str | None:
    if not name.startswith("single_transformer_blocks."):
        return _double(name, module, denoiser)
    if name.count(".") > 1:
        return None
    width = output_width(module.get_submodule("proj_out"))
    return None if width is None else Place("block", width, element=1, goes=HOLDS)


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
        places=_places,
    ),
)
