# SPDX-License-Identifier: Apache-2.0
"""Tiny ACE-Step 1.5 and LongCat-AudioDiT."""

from __future__ import annotations

from typing import Any

from . import parts
from .family import Family, prompted

_WIDTH = 32
_LATENTS = 8


def _ace_step(layers: int, scheduler: Any) -> Any:
    from diffusers import AceStepPipeline, AceStepTransformer1DModel
    from diffusers.pipelines.ace_step.modeling_ace_step import AceStepConditionEncoder

    tokenizer = parts.word_tokenizer(max_length=64)
    attention = {
        "hidden_size": _WIDTH,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 16,
    }
    transformer = AceStepTransformer1DModel(
        num_hidden_layers=layers,
        in_channels=3 * _LATENTS,  # latents, source and mask
        audio_acoustic_hidden_dim=_LATENTS,
        patch_size=2,
        **attention,
    )
    condition_encoder = AceStepConditionEncoder(
        text_hidden_dim=_WIDTH,
        timbre_hidden_dim=_LATENTS,
        num_lyric_encoder_hidden_layers=1,
        num_timbre_encoder_hidden_layers=1,
        **attention,
    )
    return AceStepPipeline(
        vae=parts.audio_autoencoder(_LATENTS),
        text_encoder=parts.spread_words(_qwen(tokenizer)),
        tokenizer=tokenizer,
        transformer=parts.louder(parts.fill_zeros(transformer)),
        condition_encoder=condition_encoder,
        scheduler=scheduler,
    )


def _qwen(tokenizer: Any) -> Any:
    from transformers import Qwen3Config, Qwen3Model

    return Qwen3Model(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=_WIDTH,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=128,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.eos_token_id,
        )
    )


def _ace_step_arguments(_pipe: Any, prompts: list[str]) -> dict[str, Any]:
    return {
        "prompt": prompts,
        "lyrics": ["la"] * len(prompts),
        "audio_duration": 6.0,
        "max_text_length": 64,
        "output_type": "latent",
    }


def _longcat(layers: int, scheduler: Any) -> Any:
    from diffusers import (
        LongCatAudioDiTPipeline,
        LongCatAudioDiTTransformer,
        LongCatAudioDiTVae,
    )

    tokenizer = parts.word_tokenizer(max_length=10)
    transformer = LongCatAudioDiTTransformer(
        dit_dim=_WIDTH,
        dit_depth=layers,
        dit_heads=4,
        dit_text_dim=parts.TEXT_WIDTH,
        latent_dim=_LATENTS,
    )
    return LongCatAudioDiTPipeline(
        vae=LongCatAudioDiTVae(
            channels=4,
            c_mults=[1, 2],
            strides=[2],
            latent_dim=_LATENTS,
            encoder_latent_dim=2 * _LATENTS,
            downsampling_ratio=2,
            sample_rate=8,
        ),
        text_encoder=parts.spread_words(parts.t5_encoder(len(tokenizer), kind="UMT5")),
        tokenizer=tokenizer,
        transformer=parts.louder(parts.fill_zeros(transformer)),
        scheduler=scheduler,
    )


FAMILIES = {
    "ace_step": Family(_ace_step, _ace_step_arguments, ("AceStepPipeline",), scheduler="flow_unit"),
    "longcat_audio": Family(
        _longcat,
        prompted(audio_duration_s=3.0, output_type="latent"),
        ("LongCatAudioDiTPipeline",),
        scheduler="flow_inverted",
    ),
}
