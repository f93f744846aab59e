# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion 1 and 2, SDXL, and what shares their U-Net: ControlNet, img2img, inpainting."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..adapter import (
    Adapter,
    Keywords,
    call_argument,
    call_shape,
    call_timestep,
    register_adapter,
)
from ..attention import ADDED, Attention, described
from .unet import unet_places, unet_tokens

_plain = described("text", ADDED)


def _describe(name: str, module: nn.Module, denoiser: nn.Module) -> Attention | str:
    if getattr(module, "added_kv_proj_dim", None) is not None:
        return "its keys and values come from latents and text together, over 4-D states"
    return _plain(name, module, denoiser)


def _verify(
    args: tuple[Any, ...], kwargs: Keywords, samples: int, branches: tuple[str, ...]
) -> None:
    # Without a context every `attn2` would be a self-attention that is listed as cross-attention.
    if call_argument(args, kwargs, 2, "encoder_hidden_states") is None:
        raise RuntimeError(
            "sites: expected encoder_hidden_states [table of stable_diffusion: the text that "
            "cross-attention reads], got None: register an adapter for this pipeline"
        )


register_adapter(
    "UNet2DConditionModel",
    Adapter(
        family="stable_diffusion",
        components=("unet",),
        branches={1: ("cond",), 2: ("uncond", "cond")},
        shape=call_shape((0, "sample"), (2, "encoder_hidden_states")),
        tokens=unet_tokens,
        timestep=call_timestep(1),
        verify=_verify,
        describe=_describe,
        places=unet_places,
    ),
)
