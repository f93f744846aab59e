# SPDX-License-Identifier: Apache-2.0
"""Tiny Wan: a video transformer, and two of them that share the steps as in Wan 2.2."""

from __future__ import annotations

from typing import Any

from . import parts
from .family import Family, prompted

_PROMPT_TOKENS = 12


def _transformer(layers: int) -> Any:
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=parts.TEXT_WIDTH,
        freq_dim=16,
        ffn_dim=32,
        num_layers=layers,
        rope_max_seq_len=32,
    )
    return parts.louder(parts.fill_zeros(model))


def _wan(layers: int, scheduler: Any, **second: Any) -> Any:
    from diffusers import AutoencoderKLWan, WanPipeline

    tokenizer = parts.word_tokenizer(_PROMPT_TOKENS)
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=parts.spread_words(parts.t5_encoder(len(tokenizer), kind="UMT5")),
        vae=AutoencoderKLWan(
            base_dim=3,
            z_dim=16,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
        ),
        scheduler=scheduler,
        transformer=_transformer(layers),
        **second,
    )


def _wan22(layers: int, scheduler: Any) -> Any:
    # The first transformer works above 60 % of the noise, the second below.
    return _wan(layers, scheduler, transformer_2=_transformer(layers), boundary_ratio=0.6)


_ARGUMENTS = prompted(
    height=32,
    width=32,
    num_frames=5,
    max_sequence_length=_PROMPT_TOKENS,
    output_type="latent",
)

FAMILIES = {
    name: Family(
        build,
        _ARGUMENTS,
        ("WanPipeline",),
        scheduler="flow",
        per_prompt="num_videos_per_prompt",
    )
    for name, build in (("wan", _wan), ("wan22", _wan22))
}
