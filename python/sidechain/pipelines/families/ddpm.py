# SPDX-License-Identifier: Apache-2.0
"""DDPM and what shares its U-Net: no condition, attention over 4-D states."""

from __future__ import annotations

from torch import nn

from ..adapter import Adapter, call_shape, call_timestep, register_adapter
from ..attention import HOLDS, Attention, read_attention
from .unet import unet_places, unet_tokens


def _describe(name: str, module: nn.Module, denoiser: nn.Module) -> Attention | str:
    return read_attention(module, "self", goes=HOLDS)


register_adapter(
    "UNet2DModel",
    Adapter(
        family="ddpm",
        components=("unet",),
        branches={1: ("cond",)},
        shape=call_shape((0, "sample")),
        tokens=unet_tokens,
        timestep=call_timestep(1),
        describe=_describe,
        places=unet_places,
    ),
)
