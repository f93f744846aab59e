# SPDX-License-Identifier: Apache-2.0
"""AudioLDM and MusicLDM: the U-Net of Stable Diffusion, with the prompt as a class embedding."""

from __future__ import annotations

from typing import Any

from ..adapter import (
    Adapter,
    Keywords,
    call_argument,
    call_shape,
    call_timestep,
    register_adapter,
)
from ..attention import ADDED, with_context
from .unet import unet_places, unet_tokens


def _verify(
    args: tuple[Any, ...], kwargs: Keywords, samples: int, branches: tuple[str, ...]
) -> None:
    if call_argument(args, kwargs, 2, "encoder_hidden_states") is not None:
        raise RuntimeError(
            "sites: expected no encoder_hidden_states [table of audioldm: every attention is "
            "self-attention], got some"
        )


_AUDIOLDM = Adapter(
    family="audioldm",
    components=("unet",),
    branches={1: ("cond",), 2: ("uncond", "cond")},
    shape=call_shape((0, "sample")),
    tokens=unet_tokens,
    timestep=call_timestep(1),
    verify=_verify,
    # `attn2` calls itself cross-attention and is given no context.
    describe=with_context(goes=ADDED),
    places=unet_places,
)
for _pipeline in ("AudioLDMPipeline", "MusicLDMPipeline"):
    register_adapter("UNet2DConditionModel", _AUDIOLDM, pipeline=_pipeline)
