# SPDX-License-Identifier: Apache-2.0
"""Save a tiny CLAP and a tiny CLIP with their processors, to be loaded from a folder."""

from __future__ import annotations

from pathlib import Path

import torch

from . import parts
from .audioldm import clap_config, feature_extractor, letter_tokenizer


def tiny_clap(folder: str | Path, *, seed: int = 0) -> Path:
    """Save a random `ClapModel` with its `ClapProcessor`: one second of sound at 16 kHz.

    Args:
        folder: made if it is not there.
        seed: of the weights; the global random state is left as it was.

    Returns:
        The folder, for `ClapModel.from_pretrained` and `AutoProcessor.from_pretrained`.
    """
    from transformers import ClapModel, ClapProcessor

    tokenizer = letter_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = parts.spread_words(ClapModel(clap_config(len(tokenizer))))
    model.eval().save_pretrained(folder)
    ClapProcessor(feature_extractor(), tokenizer).save_pretrained(folder)
    return Path(folder)


def tiny_clip(folder: str | Path, *, seed: int = 0) -> Path:
    """Save a random `CLIPModel` with its `CLIPProcessor`: images of 16 x 16 pixels.

    Args:
        folder: made if it is not there.
        seed: of the weights; the global random state is left as it was.

    Returns:
        The folder, for `CLIPModel.from_pretrained` and `AutoProcessor.from_pretrained`.
    """
    from transformers import CLIPConfig, CLIPModel, CLIPProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = parts.word_tokenizer(16, framed=True)
    vision = {
        "hidden_size": parts.TEXT_WIDTH,
        "intermediate_size": 37,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 16,
        "patch_size": 4,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = CLIPConfig(
            text_config=parts.clip_text_config(tokenizer).to_dict(),
            vision_config=vision,
            projection_dim=parts.TEXT_WIDTH,
        )
        model = parts.spread_words(CLIPModel(config))
    model.eval().save_pretrained(folder)
    images = CLIPImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    )
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return Path(folder)
