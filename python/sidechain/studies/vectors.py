# SPDX-License-Identifier: Apache-2.0
"""Make a steering vector from the prompt pairs of a concept, or from given ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.concepts import concept
from ..vectors import SteeringVector, caa
from . import common


@dataclass(frozen=True)
class VectorConfig:
    """Settings of `sidechain vector`; see `sidechain vector --help`."""

    concept: str
    out: Path | None = None
    model: str = "zoo:music"
    prompts: tuple[Sequence[str], Sequence[str]] | None = None
    pairs: int = 50
    sites: str = "cross:*"
    seed: int = 0
    normalise: bool = False
    steps: int = 20
    guidance: float = 3.0
    batch_rows: int = 64


def build(pipe: Any, config: VectorConfig, *, progress: bool = True) -> SteeringVector:
    """CAA vector of the config's concept, not saved."""
    if config.prompts is None:
        pairs = concept(config.concept).pairs(config.pairs, common.VECTOR_PROMPTS)
        positive = [pair.clean for pair in pairs]
        negative = [pair.corrupted for pair in pairs]
    else:
        positive, negative = (list(side)[: config.pairs] for side in config.prompts)
    seeds = [common.noise_seed(config.seed, index) for index in range(len(positive))]
    return caa(
        pipe,
        positive,
        negative,
        common.site_patterns(config.sites),
        seeds=seeds,
        batch_size=max(1, config.batch_rows // 2),
        normalise=config.normalise,
        concept=config.concept,
        progress=progress,
        num_inference_steps=config.steps,
        guidance_scale=config.guidance,
    )


def run(config: VectorConfig) -> SteeringVector:
    """Make the vector and save it to `config.out` (safetensors)."""
    pipe, _ = common.load(config.model)
    vector = build(pipe, config)
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        vector.save(config.out)
    return vector
