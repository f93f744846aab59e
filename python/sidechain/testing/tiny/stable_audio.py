# SPDX-License-Identifier: Apache-2.0
"""Tiny Stable Audio Open and Stable Audio 3."""

from __future__ import annotations

from typing import Any

from . import parts
from .family import Family, prompted

_CONTEXT_WIDTH = 12


def _stable_audio(layers: int, scheduler: Any) -> Any:
    from diffusers import StableAudioDiTModel, StableAudioPipeline, StableAudioProjectionModel

    tokenizer = parts.word_tokenizer(max_length=8)
    transformer = StableAudioDiTModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        num_layers=layers,
        attention_head_dim=4,
        num_attention_heads=4,
        num_key_value_attention_heads=2,
        cross_attention_dim=_CONTEXT_WIDTH,
        cross_attention_input_dim=_CONTEXT_WIDTH,
        global_states_input_dim=2 * _CONTEXT_WIDTH,
        time_proj_dim=8,
    )
    pipe = StableAudioPipeline(
        text_encoder=parts.t5_encoder(len(tokenizer)),
        vae=parts.audio_autoencoder(3),
        projection_model=StableAudioProjectionModel(
            text_encoder_dim=parts.TEXT_WIDTH,
            conditioning_dim=_CONTEXT_WIDTH,
            min_value=0,
            max_value=32,
        ),
        tokenizer=tokenizer,
        transformer=transformer,
        scheduler=scheduler,
    )
    parts.spread_words(pipe.text_encoder)
    return pipe


def _stable_audio3(layers: int, scheduler: Any) -> Any:
    from diffusers import AutoencoderSAME, StableAudio3DiTModel, StableAudio3Pipeline
    from diffusers.pipelines.stable_audio_3.modeling_stable_audio_3 import (
        StableAudio3DurationEmbedder,
    )

    tokenizer = parts.word_tokenizer(max_length=10)
    transformer = StableAudio3DiTModel(
        io_channels=8,
        embed_dim=32,
        depth=layers,
        num_heads=4,
        cond_token_dim=16,
        global_cond_dim=16,
        local_add_cond_dim=9,
        timestep_features_dim=16,
        num_memory_tokens=3,
    )
    return StableAudio3Pipeline(
        vae=AutoencoderSAME(
            patch_size=2,
            encoder_channels=8,
            encoder_c_mults=(2,),
            encoder_strides=(2,),
            encoder_transformer_depths=(1,),
            latent_dim=8,
            dim_heads=8,
            sampling_rate=16,
        ),
        text_encoder=_gemma_encoder(tokenizer),
        tokenizer=tokenizer,
        duration_embedder=StableAudio3DurationEmbedder(output_dim=16, fourier_dim=8, max_val=32.0),
        transformer=parts.louder(parts.fill_zeros(transformer)),
        scheduler=scheduler,
    )


def _gemma_encoder(tokenizer: Any) -> Any:
    from transformers import T5GemmaConfig, T5GemmaEncoderModel, T5GemmaModuleConfig

    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 32,
        "sliding_window": 16,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.eos_token_id,
    }
    config = T5GemmaConfig(
        encoder=T5GemmaModuleConfig(**settings),
        decoder=T5GemmaModuleConfig(**settings),
        is_encoder_decoder=False,
        vocab_size=len(tokenizer),
    )
    return parts.spread_words(T5GemmaEncoderModel(config))


FAMILIES = {
    "stable_audio": Family(
        _stable_audio,
        prompted(output_type="latent"),
        ("StableAudioPipeline",),
        layers=3,
        scheduler="edm",
        per_prompt="num_waveforms_per_prompt",
    ),
    "stable_audio3": Family(
        _stable_audio3,
        prompted(output_type="latent", duration=2.0, guidance_scale=3.0),
        ("StableAudio3Pipeline",),
        scheduler="flow_unit",
        per_prompt="num_waveforms_per_prompt",
    ),
}
