# SPDX-License-Identifier: Apache-2.0
"""A tiny unconditional U-Net."""

from __future__ import annotations

from typing import Any

from . import parts
from .family import Family, unconditional


def _ddpm(layers: int, scheduler: Any) -> Any:
    from diffusers import DDPMPipeline, UNet2DModel

    unet = UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        layers_per_block=layers,
        norm_num_groups=4,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    return DDPMPipeline(unet=parts.louder(unet), scheduler=scheduler)


FAMILIES = {
    "ddpm": Family(
        _ddpm, unconditional(output_type="pt"), ("DDPMPipeline",), layers=1, scheduler="ddpm"
    )
}
