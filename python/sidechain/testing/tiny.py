# SPDX-License-Identifier: Apache-2.0
"""Tiny random pipelines: real diffusers classes, random weights, no download."""

from __future__ import annotations

import string
import warnings
from typing import Any

import torch
from torch import Tensor

PIPELINES = ("stable_audio", "music")
_WORDS = (
    *("a", "an", "and", "the", "of", "with", "in", "no", "slow", "fast", "happy", "sad"),
    *("piece", "song", "music", "loop", "instrumental", "piano", "violin", "guitar", "flute"),
    *("drums", "bass", "vocals", "organ", "techno", "jazz", "rock", "classical"),
    *(f"w{i}" for i in range(32)),
    *string.ascii_lowercase[1:],
)


def tiny_pipeline(
    name: str = "stable_audio",
    *,
    scheduler: Any = None,
    layers: int = 3,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """Build a diffusers pipeline with random weights that generates in milliseconds.

    Args:
        name: "stable_audio", or "music" for the zoo's `MusicPipeline`.
        scheduler: "edm" (deterministic), "heun", "cosine" (stochastic, needs torchsde), or a
            diffusers scheduler. None = "edm", or the zoo's own.
        layers: number of transformer blocks.
        seed: of the weights; the global random state is left as it was.
        dtype: of the models.

    Returns:
        A `StableAudioPipeline`: 2 channels, 8 latent frames, width 16, cross context of 10 tokens;
        about 80 words are known to its tokenizer, the others become `<unk>`. Or a `MusicPipeline`:
        64 latent frames of 64 channels, width 16, the zoo's tokenizer, a random orthonormal codec.

    Raises:
        ValueError: an unknown name.
    """
    if name not in PIPELINES:
        raise ValueError(f"tiny_pipeline: expected one of {', '.join(PIPELINES)}, got {name!r}")
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # diffusers' autoencoder still uses the old form of weight norm.
        warnings.simplefilter("ignore", FutureWarning)
        torch.manual_seed(seed)
        if name == "music":
            pipe = _music(layers, scheduler)
        else:
            pipe = _stable_audio(layers, _scheduler(scheduler or "edm"))
    if dtype != torch.float32:
        pipe = pipe.to(dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(
    pipe: Any, prompts: list[str], *, steps: int = 4, seeds: list[int] | None = None, **call: Any
) -> Tensor:
    """Run a pipeline with one generator for each sample.

    Args:
        pipe: audio pipeline.
        prompts: one for each sample.
        steps: num_inference_steps.
        seeds: one for each sample. None = 0, 1, ...
        **call: further arguments of the pipeline.

    Returns:
        Latents.
    """
    samples = len(prompts) * call.get("num_waveforms_per_prompt", 1)
    seeds = list(range(samples)) if seeds is None else seeds
    call.setdefault("generator", [torch.Generator().manual_seed(s) for s in seeds])
    latents: Tensor = pipe(prompts, num_inference_steps=steps, output_type="latent", **call).audios
    return latents


def _scheduler(scheduler: Any) -> Any:
    import diffusers

    if not isinstance(scheduler, str):
        return scheduler
    if scheduler == "edm":
        return diffusers.EDMDPMSolverMultistepScheduler(prediction_type="v_prediction")
    if scheduler == "heun":
        return diffusers.HeunDiscreteScheduler()
    if scheduler == "cosine":
        return diffusers.CosineDPMSolverMultistepScheduler(solver_order=2)
    raise ValueError(
        f"tiny_pipeline: expected scheduler 'edm', 'heun', 'cosine' or an object, got {scheduler!r}"
    )


def _stable_audio(layers: int, scheduler: Any) -> Any:
    from diffusers import (
        AutoencoderOobleck,
        StableAudioDiTModel,
        StableAudioPipeline,
        StableAudioProjectionModel,
    )
    from transformers import T5Config, T5EncoderModel

    text_width, context_width = 32, 12
    tokenizer = _tokenizer(max_length=8)
    transformer = StableAudioDiTModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        num_layers=layers,
        attention_head_dim=4,
        num_attention_heads=4,
        num_key_value_attention_heads=2,
        cross_attention_dim=context_width,
        cross_attention_input_dim=context_width,
        global_states_input_dim=2 * context_width,
        time_proj_dim=8,
    )
    text_encoder = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=text_width,
            d_kv=8,
            d_ff=37,
            num_layers=1,
            num_heads=4,
            dropout_rate=0.0,
        )
    )
    pipe = StableAudioPipeline(
        vae=AutoencoderOobleck(
            encoder_hidden_size=6,
            downsampling_ratios=[1, 2],
            decoder_channels=3,
            decoder_input_channels=3,
            audio_channels=2,
            channel_multiples=[2, 4],
            sampling_rate=4,
        ),
        text_encoder=text_encoder,
        projection_model=StableAudioProjectionModel(
            text_encoder_dim=text_width, conditioning_dim=context_width, min_value=0, max_value=32
        ),
        tokenizer=tokenizer,
        transformer=transformer,
        scheduler=scheduler,
    )
    for module in (pipe.vae, pipe.text_encoder, pipe.projection_model, pipe.transformer):
        module.eval().requires_grad_(False)
    # Without this the random text encoder gives nearly the same states for every word.
    pipe.text_encoder.shared.weight.data.normal_(std=3.0)
    return pipe


def _music(layers: int, scheduler: Any) -> Any:
    from ..zoo.music.codec import LinearMelCodec
    from ..zoo.music.pipeline import MusicPipeline
    from ..zoo.music.text import build_text_encoder, build_tokenizer
    from ..zoo.recipes.train_music import MusicRecipe, build_scheduler, build_transformer

    tokenizer = build_tokenizer()
    transformer = build_transformer(MusicRecipe(layers=layers, heads=2, head_width=8))
    text_encoder = build_text_encoder(len(tokenizer))
    codec = LinearMelCodec()
    codec.mean.fill_(-0.5)
    codec.basis.copy_(torch.linalg.qr(torch.randn(256, 64))[0].T)
    for module in (text_encoder, transformer, codec):
        module.eval().requires_grad_(False)
    own = build_scheduler() if scheduler is None else _scheduler(scheduler)
    return MusicPipeline(tokenizer, text_encoder, transformer, own, codec)


def _tokenizer(max_length: int) -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {
        word: i for i, word in enumerate(dict.fromkeys(("<pad>", "</s>", "<unk>", *_WORDS)))
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=max_length,
    )
