# SPDX-License-Identifier: Apache-2.0
"""A tiny `MusicPipeline` of the zoo."""

from __future__ import annotations

from typing import Any

import torch

from .family import Family, prompted


def _music(layers: int, scheduler: Any) -> Any:
    from ...zoo.music.codec import LinearMelCodec
    from ...zoo.music.pipeline import MusicPipeline
    from ...zoo.music.text import build_text_encoder, build_tokenizer
    from ...zoo.recipes.train_music import MusicRecipe, build_scheduler, build_transformer

    tokenizer = build_tokenizer()
    transformer = build_transformer(MusicRecipe(layers=layers, heads=2, head_width=8))
    text_encoder = build_text_encoder(len(tokenizer))
    codec = LinearMelCodec()
    codec.mean.fill_(-0.5)
    codec.basis.copy_(torch.linalg.qr(torch.randn(256, 64))[0].T)
    if scheduler is None:
        scheduler = build_scheduler()
    return MusicPipeline(tokenizer, text_encoder, transformer, scheduler, codec)


FAMILIES = {
    "music": Family(
        _music,
        prompted(output_type="latent"),
        ("MusicPipeline",),
        layers=3,
        scheduler=None,
        per_prompt="num_waveforms_per_prompt",
    )
}
