# SPDX-License-Identifier: Apache-2.0
"""Make a steering vector from the prompt pairs of a concept, or from given ones.

Two methods: "caa", the mean difference of the activations, and "sae", the decoder rows of the
dictionary features that score best.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...pipelines import sites as list_sites
from ...sae import Sae
from ...sae.features.scoring import feature_statistics
from ...taps import share
from ...vectors import SteeringVector, caa, sae_features
from ...zoo.music.concepts import concept
from .. import common

METHODS = ("caa", "sae")


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
    method: str = "caa"
    dictionaries: Path | None = None
    features: int = 20
    score: str = "tada"
    weighting: str = "natural"


def build(pipe: Any, config: VectorConfig, *, progress: bool = True) -> SteeringVector:
    """Vector of the config's concept, not saved.

    Keys and values of the prompts are computed once a run and not once a step.

    Raises:
        ValueError: an unknown method, or with "sae" a site without a dictionary.
    """
    if config.method not in METHODS:
        raise ValueError(
            f"vector: expected method to be one of {', '.join(METHODS)}, got {config.method!r}"
        )
    with share(pipe):
        return _build(pipe, config, progress)


def _build(pipe: Any, config: VectorConfig, progress: bool) -> SteeringVector:
    positive, negative = prompt_pairs(config)
    seeds = [common.noise_seed(config.seed, index) for index in range(len(positive))]
    call: dict[str, Any] = {
        "num_inference_steps": config.steps,
        "guidance_scale": config.guidance,
    }
    batch_size = max(1, config.batch_rows // 2)
    if config.method == "caa":
        return caa(
            pipe,
            positive,
            negative,
            common.site_patterns(config.sites),
            seeds=seeds,
            batch_size=batch_size,
            normalise=config.normalise,
            concept=config.concept,
            progress=progress,
            **call,
        )
    saes = dictionaries(pipe, config.sites, config.dictionaries)
    statistics = feature_statistics(
        pipe,
        saes,
        positive,
        negative,
        seeds=seeds,
        batch_size=batch_size,
        progress=progress,
        **call,
    )
    return sae_features(
        pipe,
        saes,
        statistics,
        method=config.score,
        count=config.features,
        weighting=config.weighting,
        concept=config.concept,
        pairs=len(positive),
        seeds=seeds,
        call=call,
    )


def prompt_pairs(config: VectorConfig) -> tuple[list[str], list[str]]:
    """Prompts with and without the concept: given ones, or from its templates."""
    if config.prompts is not None:
        positive, negative = (list(side)[: config.pairs] for side in config.prompts)
        return positive, negative
    pairs = concept(config.concept).pairs(config.pairs, common.VECTOR_PROMPTS)
    return [pair.clean for pair in pairs], [pair.corrupted for pair in pairs]


def dictionaries(pipe: Any, pattern: str, folder: Path | None) -> dict[str, Sae]:
    """Dictionaries of the sites of a pattern that have one, by alias.

    Args:
        pipe: the pipeline.
        pattern: comma list of sites.
        folder: with files named as the zoo's, `cross-6.safetensors`; None = those of the zoo.

    Raises:
        ValueError: no site of the pattern has one.
    """
    from ... import zoo

    chosen = list_sites(pipe, common.site_patterns(pattern)).aliases
    if folder is None:
        known = zoo.dictionaries()
        found = {alias: zoo.dictionary(alias) for alias in chosen if alias in known}
    else:
        paths = {alias: folder / zoo.dictionary_file(alias) for alias in chosen}
        found = {alias: Sae.load(path) for alias, path in paths.items() if path.is_file()}
    if not found:
        where = "the zoo" if folder is None else str(folder)
        raise ValueError(
            f"dictionaries: expected a dictionary in {where} for one of {', '.join(chosen)}, got "
            "none"
        )
    return found


def run(config: VectorConfig) -> SteeringVector:
    """Make the vector and save it to `config.out` (safetensors)."""
    pipe, _ = common.load(config.model)
    vector = build(pipe, config)
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        vector.save(config.out)
    return vector
