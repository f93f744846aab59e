# SPDX-License-Identifier: Apache-2.0
"""Tiny AudioLDM, MusicLDM and AudioLDM2, and the CLAP model that reads their prompts."""

from __future__ import annotations

from typing import Any

import torch

from . import parts
from .family import Family, prompted

_SECONDS = 0.008  # 32 frames of the spectrogram
_PROJECTION = 16


def clap_config(tokens: int) -> Any:
    """Describe a CLAP model of one text layer for a vocabulary of `tokens`."""
    from transformers import ClapConfig

    return ClapConfig(
        text_config={
            "vocab_size": tokens,
            "hidden_size": 16,
            "intermediate_size": 37,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_position_embeddings": 40,
            "projection_dim": _PROJECTION,
            "bos_token_id": 0,
            "pad_token_id": 1,
            "eos_token_id": 2,
        },
        audio_config={
            "spec_size": 64,
            "window_size": 4,
            "num_mel_bins": 16,
            "intermediate_size": 37,
            "depths": [1, 1],
            "num_attention_heads": [1, 1],
            "num_hidden_layers": 2,
            "hidden_size": 32,
            "projection_dim": _PROJECTION,
            "patch_size": 4,
            "patch_stride": 4,
            "patch_embeds_hidden_size": 16,
            "patch_embed_input_channels": 1,
            "enable_fusion": False,
        },
        projection_dim=_PROJECTION,
    )


def letter_tokenizer(max_length: int = 30) -> Any:
    """Make a `RobertaTokenizer` with a token for each letter."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import RobertaTokenizer

    # Id 1 is the padding: RoBERTa counts positions from the first token that is not.
    special = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
    letters = (*special, *sorted(ByteLevel.alphabet()))
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    return RobertaTokenizer(vocab=vocabulary, merges=[], model_max_length=max_length)


def _piece_tokenizer(max_length: int) -> Any:
    from transformers import T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -2.0)]
    pieces += [(f"\u2581{word}", -1.0) for word in dict.fromkeys(parts.WORDS)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=max_length)


def _spectrogram_autoencoder() -> Any:
    return parts.image_autoencoder(channels=(8, 16), image_channels=1)


def _film_unet(layers: int) -> Any:
    from diffusers import UNet2DConditionModel

    # The prompt is a class embedding: `attn2` has the width of the block and reads no context.
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        transformer_layers_per_block=layers,
        norm_num_groups=8,
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=(8, 16),
        attention_head_dim=2,
        class_embed_type="simple_projection",
        projection_class_embeddings_input_dim=_PROJECTION,
        class_embeddings_concat=True,
    )
    unet.class_embedding.weight.data.mul_(8.0)  # embeddings of prompts have length 1
    return parts.louder(unet)


def _audioldm(layers: int, scheduler: Any) -> Any:
    from diffusers import AudioLDMPipeline
    from transformers import ClapTextModelWithProjection

    tokenizer = letter_tokenizer()
    encoder = ClapTextModelWithProjection(clap_config(len(tokenizer)).text_config)
    return AudioLDMPipeline(
        vae=_spectrogram_autoencoder(),
        text_encoder=parts.spread_words(encoder),
        tokenizer=tokenizer,
        unet=_film_unet(layers),
        scheduler=scheduler,
        vocoder=parts.vocoder(),
    )


def _musicldm(layers: int, scheduler: Any) -> Any:
    from diffusers import MusicLDMPipeline
    from transformers import ClapModel

    tokenizer = letter_tokenizer()
    return MusicLDMPipeline(
        vae=_spectrogram_autoencoder(),
        text_encoder=parts.spread_words(ClapModel(clap_config(len(tokenizer)))),
        tokenizer=tokenizer,
        feature_extractor=feature_extractor(),
        unet=_film_unet(layers),
        scheduler=scheduler,
        vocoder=parts.vocoder(),
    )


def feature_extractor() -> Any:
    """Make the feature extractor that fits `clap_config`."""
    from transformers import ClapFeatureExtractor

    return ClapFeatureExtractor(
        feature_size=16,
        sampling_rate=16000,
        hop_length=160,
        max_length_s=1,
        fft_window_size=512,
        frequency_max=8000,
        truncation="rand_trunc",
    )


def _musicldm_arguments(pipe: Any, prompts: list[str]) -> dict[str, Any]:
    # diffusers 0.42 calls `.shape` on what CLAP returns, which transformers 5 has wrapped: prompts
    # as text fail, so the embeddings are made here.
    def embeddings(texts: list[str]) -> torch.Tensor:
        tokens = pipe.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        with torch.no_grad():
            features = pipe.text_encoder.get_text_features(**tokens)
        pooled: torch.Tensor = getattr(features, "pooler_output", features)
        return pooled

    return {
        "prompt_embeds": embeddings(prompts),
        "negative_prompt_embeds": embeddings([""] * len(prompts)),
        "audio_length_in_s": _SECONDS,
        "output_type": "latent",
    }


def _audioldm2(layers: int, scheduler: Any) -> Any:
    from diffusers import AudioLDM2Pipeline, AudioLDM2ProjectionModel, AudioLDM2UNet2DConditionModel
    from transformers import ClapModel, GPT2Config, GPT2LMHeadModel

    letters, words = letter_tokenizer(), _piece_tokenizer(max_length=8)
    language_width = 16
    unet = AudioLDM2UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        transformer_layers_per_block=layers,
        norm_num_groups=8,
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
        # As in the published models: each place holds four transformers, of which the second reads
        # GPT-2's states, the third T5's, and the others nothing but themselves.
        cross_attention_dim=((None, language_width, parts.TEXT_WIDTH, None),) * 2,
    )
    language_model = GPT2LMHeadModel(
        GPT2Config(
            max_new_tokens=3,  # read by the pipeline; not an option of GPT-2
            vocab_size=8,
            n_embd=language_width,
            n_head=2,
            n_layer=1,
            n_positions=64,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    return AudioLDM2Pipeline(
        vae=_spectrogram_autoencoder(),
        text_encoder=parts.spread_words(ClapModel(clap_config(len(letters)))),
        text_encoder_2=parts.spread_words(parts.t5_encoder(len(words))),
        projection_model=AudioLDM2ProjectionModel(_PROJECTION, parts.TEXT_WIDTH, language_width),
        language_model=language_model,
        tokenizer=letters,
        tokenizer_2=words,
        feature_extractor=feature_extractor(),
        unet=parts.louder(unet),
        scheduler=scheduler,
        vocoder=parts.vocoder(),
    )


FAMILIES = {
    "audioldm": Family(
        _audioldm,
        prompted(audio_length_in_s=_SECONDS, output_type="np"),
        ("AudioLDMPipeline",),
        layers=1,
        per_prompt="num_waveforms_per_prompt",
    ),
    "musicldm": Family(
        _musicldm,
        _musicldm_arguments,
        ("MusicLDMPipeline",),
        layers=1,
        per_prompt="num_waveforms_per_prompt",
    ),
    "audioldm2": Family(
        _audioldm2,
        prompted(audio_length_in_s=_SECONDS, max_new_tokens=3, output_type="latent"),
        ("AudioLDM2Pipeline",),
        layers=1,
        per_prompt="num_waveforms_per_prompt",
    ),
}
