# SPDX-License-Identifier: Apache-2.0
"""Tiny image transformers: Stable Diffusion 3, Flux, PixArt, DiT, Sana."""

from __future__ import annotations

from typing import Any

from . import parts
from .family import Family, labelled, prompted

_PROMPT_TOKENS = 12
_DIT_CLASSES = 1000  # fixed by the pipeline: the empty class is number 1000
_SIZE = 16
_SIZED = {"height": _SIZE, "width": _SIZE, "output_type": "latent"}


def _t5(tokenizer: Any, width: int = parts.TEXT_WIDTH) -> Any:
    return parts.spread_words(parts.t5_encoder(len(tokenizer), width=width))


def _sd3(layers: int, scheduler: Any) -> Any:
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    clip = parts.word_tokenizer(_PROMPT_TOKENS, framed=True)
    t5 = parts.word_tokenizer(_PROMPT_TOKENS)
    context_width = 2 * parts.TEXT_WIDTH
    transformer = SD3Transformer2DModel(
        sample_size=_SIZE // 2,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=context_width,
        caption_projection_dim=32,
        pooled_projection_dim=context_width,
        pos_embed_max_size=_SIZE // 2,
        # As in 3.5 medium: the first blocks have a second attention, over the image alone.
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer=parts.louder(parts.fill_zeros(transformer)),
        scheduler=scheduler,
        vae=parts.image_autoencoder(shift_factor=0.0609),
        text_encoder=parts.clip_text_encoder(clip, projected=True),
        tokenizer=clip,
        text_encoder_2=parts.clip_text_encoder(clip, projected=True),
        tokenizer_2=parts.word_tokenizer(_PROMPT_TOKENS, framed=True),
        text_encoder_3=_t5(t5, context_width),
        tokenizer_3=t5,
    )


def _flux(layers: int, scheduler: Any) -> Any:
    from diffusers import FluxPipeline, FluxTransformer2DModel

    clip = parts.word_tokenizer(_PROMPT_TOKENS, framed=True)
    t5 = parts.word_tokenizer(_PROMPT_TOKENS)
    latents = 1
    transformer = FluxTransformer2DModel(
        in_channels=4 * latents,
        num_layers=layers,
        num_single_layers=layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=parts.TEXT_WIDTH,
        pooled_projection_dim=parts.TEXT_WIDTH,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    return FluxPipeline(
        scheduler=scheduler,
        vae=parts.image_autoencoder(
            channels=(4, 4),
            latents=latents,
            use_quant_conv=False,
            use_post_quant_conv=False,
            shift_factor=0.0609,
        ),
        text_encoder=parts.clip_text_encoder(clip),
        tokenizer=clip,
        text_encoder_2=_t5(t5),
        tokenizer_2=t5,
        transformer=parts.louder(parts.fill_zeros(transformer)),
    )


def _pixart(layers: int, scheduler: Any) -> Any:
    from diffusers import PixArtAlphaPipeline, PixArtTransformer2DModel

    tokenizer = parts.word_tokenizer(_PROMPT_TOKENS)
    transformer = PixArtTransformer2DModel(
        sample_size=_SIZE // 2,
        num_layers=layers,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=parts.TEXT_WIDTH,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=24,
        use_additional_conditions=False,
    )
    return PixArtAlphaPipeline(
        tokenizer=tokenizer,
        text_encoder=_t5(tokenizer),
        vae=parts.image_autoencoder(),
        transformer=parts.louder(parts.fill_zeros(transformer)),
        scheduler=scheduler,
    )


def _dit(layers: int, scheduler: Any) -> Any:
    from diffusers import DiTPipeline, DiTTransformer2DModel

    transformer = DiTTransformer2DModel(
        sample_size=_SIZE // 2,
        num_layers=layers,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        num_embeds_ada_norm=_DIT_CLASSES,
    )
    return DiTPipeline(
        transformer=parts.louder(parts.fill_zeros(transformer)),
        vae=parts.image_autoencoder(),
        scheduler=scheduler,
    )


def _sana(layers: int, scheduler: Any) -> Any:
    from diffusers import AutoencoderDC, SanaPipeline, SanaTransformer2DModel

    tokenizer = parts.word_tokenizer(_PROMPT_TOKENS)
    transformer = SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=_SIZE,
    )
    blocks = ("ResBlock", "EfficientViTBlock")
    return SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=parts.spread_words(_gemma(tokenizer)),
        vae=AutoencoderDC(
            latent_channels=4,
            attention_head_dim=2,
            encoder_block_types=blocks,
            decoder_block_types=blocks,
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            encoder_qkv_multiscales=((), (5,)),
            decoder_qkv_multiscales=((), (5,)),
            downsample_block_type="conv",
            upsample_block_type="interpolate",
        ),
        transformer=parts.louder(parts.fill_zeros(transformer)),
        scheduler=scheduler,
    )


def _gemma(tokenizer: Any) -> Any:
    from transformers import Gemma2Config, Gemma2Model

    return Gemma2Model(
        Gemma2Config(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            max_position_embeddings=32,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.eos_token_id,
        )
    )


_PER_PROMPT = "num_images_per_prompt"

FAMILIES = {
    "sd3": Family(
        _sd3,
        prompted(max_sequence_length=_PROMPT_TOKENS, **_SIZED),
        ("StableDiffusion3Pipeline",),
        scheduler="flow",
        per_prompt=_PER_PROMPT,
    ),
    "flux": Family(
        _flux,
        prompted(max_sequence_length=_PROMPT_TOKENS, **_SIZED),
        ("FluxPipeline",),
        scheduler="flow",
        per_prompt=_PER_PROMPT,
    ),
    "pixart": Family(
        _pixart,
        prompted(
            clean_caption=False,
            use_resolution_binning=False,
            max_sequence_length=_PROMPT_TOKENS,
            **_SIZED,
        ),
        ("PixArtAlphaPipeline",),
        scheduler="dpm",
        per_prompt=_PER_PROMPT,
    ),
    "dit": Family(_dit, labelled(_DIT_CLASSES, output_type="pt"), ("DiTPipeline",)),
    "sana": Family(
        _sana,
        prompted(
            height=2 * _SIZE,
            width=2 * _SIZE,
            output_type="latent",
            use_resolution_binning=False,
            complex_human_instruction=None,
            max_sequence_length=_PROMPT_TOKENS,
        ),
        ("SanaPipeline",),
        scheduler="flow",
        per_prompt=_PER_PROMPT,
    ),
}
