# SPDX-License-Identifier: Apache-2.0
"""Tiny Stable Diffusion 1.x and SDXL, with image-to-image, inpainting and ControlNet."""

from __future__ import annotations

from typing import Any

import torch

from . import parts
from .family import Arguments, Family, prompted

_SIZE = 16  # pixels; 8 x 8 latents
_CHANNELS = (8, 16)
_PROMPT_TOKENS = 12


def _image(samples: int, channels: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(1, channels, _SIZE, _SIZE, generator=generator)
    return image.repeat(samples, 1, 1, 1)


def _with_images(*names: str, **fixed: Any) -> Arguments:
    def arguments(_pipe: Any, prompts: list[str]) -> dict[str, Any]:
        images = {
            name: _image(len(prompts), 1 if name == "mask_image" else 3, seed)
            for seed, name in enumerate(names)
        }
        return {"prompt": prompts, **images, **fixed}

    return arguments


def _unet_settings(layers: int) -> dict[str, Any]:
    # Attention at 8 x 8 with 8 channels and at 4 x 4 with 16: sites differ in tokens and width.
    return {
        "block_out_channels": _CHANNELS,
        "layers_per_block": 1,
        "transformer_layers_per_block": layers,
        "norm_num_groups": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "cross_attention_dim": parts.TEXT_WIDTH,
        "attention_head_dim": 2,
    }


def _sd_parts(layers: int, scheduler: Any, *, in_channels: int = 4) -> dict[str, Any]:
    from diffusers import UNet2DConditionModel

    tokenizer = parts.word_tokenizer(_PROMPT_TOKENS, framed=True)
    unet = UNet2DConditionModel(
        sample_size=_SIZE // 2,
        in_channels=in_channels,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        **_unet_settings(layers),
    )
    return {
        "vae": parts.image_autoencoder(),
        "text_encoder": parts.clip_text_encoder(tokenizer),
        "tokenizer": tokenizer,
        "unet": parts.louder(unet),
        "scheduler": scheduler,
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def _sd(layers: int, scheduler: Any) -> Any:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline(**_sd_parts(layers, scheduler))


def _sd_img2img(layers: int, scheduler: Any) -> Any:
    from diffusers import StableDiffusionImg2ImgPipeline

    return StableDiffusionImg2ImgPipeline(**_sd_parts(layers, scheduler))


def _sd_inpaint(layers: int, scheduler: Any) -> Any:
    from diffusers import StableDiffusionInpaintPipeline

    # Latents, mask and masked image, as the inpainting checkpoints have it.
    return StableDiffusionInpaintPipeline(**_sd_parts(layers, scheduler, in_channels=9))


def _sd_controlnet(layers: int, scheduler: Any) -> Any:
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

    components = _sd_parts(layers, scheduler)
    controlnet = ControlNetModel(
        conditioning_embedding_out_channels=(4, 8), **_unet_settings(layers)
    )
    return StableDiffusionControlNetPipeline(
        controlnet=parts.louder(parts.fill_zeros(controlnet)), **components
    )


def _sdxl_parts(layers: int, scheduler: Any) -> dict[str, Any]:
    from diffusers import UNet2DConditionModel

    tokenizer = parts.word_tokenizer(_PROMPT_TOKENS, framed=True)
    times = 8
    unet = UNet2DConditionModel(
        sample_size=_SIZE // 2,
        in_channels=4,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=times,
        # Six sizes and the summary of the second text encoder.
        projection_class_embeddings_input_dim=6 * times + parts.TEXT_WIDTH,
        **{
            **_unet_settings(layers),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "transformer_layers_per_block": (1, layers),
            "cross_attention_dim": 2 * parts.TEXT_WIDTH,
        },
    )
    return {
        "vae": parts.image_autoencoder(),
        "text_encoder": parts.clip_text_encoder(tokenizer),
        "text_encoder_2": parts.clip_text_encoder(tokenizer, projected=True),
        "tokenizer": tokenizer,
        "tokenizer_2": parts.word_tokenizer(_PROMPT_TOKENS, framed=True),
        "unet": parts.louder(unet),
        "scheduler": scheduler,
        "add_watermarker": False,
    }


def _sdxl(layers: int, scheduler: Any) -> Any:
    from diffusers import StableDiffusionXLPipeline

    return StableDiffusionXLPipeline(**_sdxl_parts(layers, scheduler))


def _sdxl_img2img(layers: int, scheduler: Any) -> Any:
    from diffusers import StableDiffusionXLImg2ImgPipeline

    return StableDiffusionXLImg2ImgPipeline(**_sdxl_parts(layers, scheduler))


_SIZED = {"height": _SIZE, "width": _SIZE, "output_type": "latent"}
_PER_PROMPT = "num_images_per_prompt"

FAMILIES = {
    "sd": Family(
        _sd, prompted(**_SIZED), ("StableDiffusionPipeline",), layers=1, per_prompt=_PER_PROMPT
    ),
    "sd_img2img": Family(
        _sd_img2img,
        _with_images("image", strength=0.7, output_type="latent"),
        ("StableDiffusionImg2ImgPipeline",),
        layers=1,
        per_prompt=_PER_PROMPT,
    ),
    "sd_inpaint": Family(
        _sd_inpaint,
        _with_images("image", "mask_image", **_SIZED),
        ("StableDiffusionInpaintPipeline",),
        layers=1,
        per_prompt=_PER_PROMPT,
    ),
    "sd_controlnet": Family(
        _sd_controlnet,
        _with_images("image", **_SIZED),
        ("StableDiffusionControlNetPipeline",),
        layers=1,
        per_prompt=_PER_PROMPT,
    ),
    "sdxl": Family(
        _sdxl,
        prompted(**_SIZED),
        ("StableDiffusionXLPipeline",),
        scheduler="euler",
        per_prompt=_PER_PROMPT,
    ),
    "sdxl_img2img": Family(
        _sdxl_img2img,
        _with_images("image", strength=0.7, output_type="latent"),
        ("StableDiffusionXLImg2ImgPipeline",),
        scheduler="euler",
        per_prompt=_PER_PROMPT,
    ),
}
