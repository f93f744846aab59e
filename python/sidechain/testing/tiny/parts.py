# SPDX-License-Identifier: Apache-2.0
"""Build the parts that tiny pipelines share: tokenizers, text encoders, autoencoders, vocoders."""

from __future__ import annotations

import string
from typing import Any

import torch

WORDS = (
    *("a", "an", "and", "the", "of", "with", "in", "no", "slow", "fast", "happy", "sad"),
    *("piece", "song", "music", "loop", "instrumental", "piano", "violin", "guitar", "flute"),
    *("drums", "bass", "vocals", "organ", "techno", "jazz", "rock", "classical"),
    *(f"w{i}" for i in range(32)),
    *string.ascii_lowercase[1:],
)
TEXT_WIDTH = 32


def word_tokenizer(max_length: int, *, framed: bool = False) -> Any:
    """Make a tokenizer with a token for each of about 80 words; the others become `<unk>`.

    Args:
        max_length: tokens of a text at most.
        framed: put `<s>` before and `</s>` behind every text, as CLIP expects it.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ("<pad>", "</s>", "<unk>", *WORDS, *(("<s>",) if framed else ()))
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    if framed:
        special["bos_token"] = "<s>"
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>",
            pair="<s> $A </s> $B </s>",
            special_tokens=[(token, vocabulary[token]) for token in ("<s>", "</s>")],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=max_length, **special
    )


def spread_words(encoder: Any) -> Any:
    """Draw token embeddings again, wider: else a random encoder hardly tells words apart."""
    reader = getattr(encoder, "text_model", encoder)  # of CLAP and CLIP only one part reads text
    reader.get_input_embeddings().weight.data.normal_(std=3.0)
    return encoder


def t5_encoder(tokens: int, *, width: int = TEXT_WIDTH, layers: int = 1, kind: str = "T5") -> Any:
    """Make a T5 or UMT5 encoder.

    Args:
        tokens: size of the vocabulary.
        width: of its states.
        layers: number of blocks.
        kind: "T5" or "UMT5".
    """
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=tokens,
        d_model=width,
        d_kv=8,
        d_ff=37,
        num_layers=layers,
        num_heads=4,
        dropout_rate=0.0,
    )
    return getattr(transformers, f"{kind}EncoderModel")(config)


def clip_text_config(tokenizer: Any, *, projection: int = TEXT_WIDTH) -> Any:
    """Describe a CLIP text encoder of two layers for a tokenizer."""
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=projection,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def clip_text_encoder(tokenizer: Any, *, projected: bool = False) -> Any:
    """Make a CLIP text encoder, with a projected summary of the text where `projected`."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    config = clip_text_config(tokenizer)
    return spread_words((CLIPTextModelWithProjection if projected else CLIPTextModel)(config))


def image_autoencoder(
    *, channels: tuple[int, ...] = (4, 8), latents: int = 4, image_channels: int = 3, **changes: Any
) -> Any:
    """Make an `AutoencoderKL`; each level but the first halves the size."""
    from diffusers import AutoencoderKL

    levels = len(channels)
    return AutoencoderKL(
        in_channels=image_channels,
        out_channels=image_channels,
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=latents,
        norm_num_groups=min(channels),
        sample_size=16,
        **changes,
    )


def audio_autoencoder(channels: int) -> Any:
    """Make an `AutoencoderOobleck`: 2 frames a second of `channels` channels."""
    from diffusers import AutoencoderOobleck

    return AutoencoderOobleck(
        encoder_hidden_size=6,
        downsampling_ratios=[1, 2],
        decoder_channels=3,
        decoder_input_channels=channels,
        audio_channels=2,
        channel_multiples=[2, 4],
        sampling_rate=4,
    )


def vocoder() -> Any:
    """Make a HiFi-GAN: 8 mel bands, 16 kHz, four samples for each frame."""
    from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

    return SpeechT5HifiGan(
        SpeechT5HifiGanConfig(
            model_in_dim=8,
            sampling_rate=16000,
            upsample_initial_channel=16,
            upsample_rates=[2, 2],
            upsample_kernel_sizes=[4, 4],
            resblock_kernel_sizes=[3, 7],
            resblock_dilation_sizes=[[1, 3, 5], [1, 3, 5]],
            normalize_before=False,
            initializer_range=0.3,  # 0.01, the default, makes a waveform of 1e-5
        )
    )


def freeze(pipe: Any) -> Any:
    """Put all models of a pipeline in evaluation mode and stop their gradients."""
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval().requires_grad_(False)
    return pipe


def fill_zeros(model: torch.nn.Module) -> torch.nn.Module:
    """Give random weights to matrices that are zero at first.

    Many denoisers start with gates or a last layer of zeros, so that nothing inside them would
    show in the output.
    """
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():
            parameter.data.normal_(std=parameter[0].numel() ** -0.5)
    return model


def louder(model: torch.nn.Module, factor: float = 2.0) -> torch.nn.Module:
    """Scale the queries, keys, values and outputs of every attention of a denoiser.

    The usual first weights of a linear layer shrink what passes by the square root of three: after
    values and outputs a third is left, and words hardly change the result.
    """
    for name, module in model.named_modules():
        leaf = name.removesuffix(".0").rpartition(".")[2]
        if isinstance(module, torch.nn.Linear) and leaf.startswith(("to_", "add_", "q_", "v_")):
            module.weight.data.mul_(factor)
    return model
