# SPDX-License-Identifier: Apache-2.0
"""Build tiny pipelines by name."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from . import (
    ace_step,
    audioldm,
    ddpm,
    music,
    stable_audio,
    stable_diffusion,
    transformers_2d,
    wan,
)
from .family import Family
from .parts import freeze
from .schedulers import make_scheduler

FAMILIES: dict[str, Family] = {
    name: family
    for module in (
        stable_audio,
        audioldm,
        ace_step,
        stable_diffusion,
        transformers_2d,
        ddpm,
        wan,
        music,
    )
    for name, family in module.FAMILIES.items()
}
PIPELINES = tuple(FAMILIES)


def tiny_pipeline(
    name: str = "stable_audio",
    *,
    scheduler: Any = None,
    layers: int | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """Build a diffusers pipeline with random weights that generates in milliseconds.

    The classes are those of diffusers and transformers, tokenizers included; nothing is downloaded.
    Weights are drawn so that prompts and attention really show in the result.

    Args:
        name: one of `PIPELINES`: "stable_audio", "sdxl", "flux" ..., or "music" for the zoo's
            `MusicPipeline`.
        scheduler: a name of `SCHEDULERS`, such as "edm", "heun" or "cosine" (stochastic, needs
            torchsde), or a diffusers scheduler. None = the family's own, deterministic where the
            family allows it.
        layers: number of transformer blocks; of a U-Net, blocks of each of its transformers. None =
            the family's own.
        seed: of the weights; the global random state is left as it was.
        dtype: of the models.

    Returns:
        A pipeline to be called as `call_tiny` does. Stable Audio: 2 channels, 8 latent frames,
        width 16, cross context of 10 tokens; about 80 words are known to its tokenizer, the others
        become `<unk>`. `MusicPipeline`: 64 latent frames of 64 channels, width 16, the zoo's
        tokenizer, a random orthonormal codec.

    Raises:
        ValueError: an unknown name.
    """
    if name not in FAMILIES:
        raise ValueError(f"tiny_pipeline: expected one of {', '.join(PIPELINES)}, got {name!r}")
    family = FAMILIES[name]
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # diffusers' autoencoder still uses the old form of weight norm.
        warnings.simplefilter("ignore", FutureWarning)
        torch.manual_seed(seed)
        made = make_scheduler(family.scheduler if scheduler is None else scheduler)
        pipe = freeze(family.build(family.layers if layers is None else layers, made))
    if dtype != torch.float32:
        pipe = pipe.to(dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe
