# SPDX-License-Identifier: Apache-2.0
"""Make a steering vector from the prompt pairs of a concept, or from given ones.

Two methods: "caa", the mean difference of the activations, and "sae", the decoder rows of the
dictionary features that score best.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..._errors import InputError
from ...pipelines import PromptPairs
from ...pipelines import sites as list_sites
from ...sae import Sae
from ...sae.features.scoring import feature_statistics
from ...taps import cache_context
from ...vectors import SteeringVector, caa, sae_features
from ...zoo.music.concepts import concept
from .. import common
from .config import VectorConfig as VectorConfig


def build(pipe: Any, config: VectorConfig, *, progress: bool = True) -> SteeringVector:
    """Build the vector of the concept in `config`, without saving it.

    Keys and values of the prompts are computed once in a generation, not at every step.

    Raises:
        InputError: neither concept nor prompts, or with "sae" a site without a dictionary.
    """
    with cache_context(pipe):
        return _build(pipe, config, progress)


def _build(pipe: Any, config: VectorConfig, progress: bool) -> SteeringVector:
    pairs = prompt_pairs(config)
    call: dict[str, Any] = {
        "num_inference_steps": config.steps,
        "guidance_scale": config.guidance,
    }
    batch_size = max(1, config.batch_rows // 2)
    if config.method == "caa":
        return caa(
            pipe,
            pairs,
            common.site_patterns(config.sites),
            batch_size=batch_size,
            normalise=config.normalise,
            progress=progress,
            **call,
        )
    saes = dictionaries(pipe, config.sites, config.dictionaries)
    statistics = feature_statistics(
        pipe, saes, pairs, batch_size=batch_size, progress=progress, **call
    )
    return sae_features(
        pipe,
        saes,
        statistics,
        pairs,
        method=config.score,
        count=config.features,
        weighting=config.weighting,
        **call,
    )


def prompt_pairs(config: VectorConfig) -> PromptPairs:
    """Return prompts with and without the concept: given ones, or from its templates."""
    if config.prompts is None and config.concept is None:
        raise InputError("vector: expected a concept or prompts, got neither")
    if config.prompts is not None:
        sides = [list(side)[: config.pairs] for side in config.prompts]
    else:
        pairs = concept(config.concept or "").pairs(config.pairs, common.VECTOR_PROMPTS)
        sides = [[pair.clean for pair in pairs], [pair.corrupted for pair in pairs]]
    seeds = [common.noise_seed(config.seed, index) for index in range(len(sides[0]))]
    return PromptPairs(sides[0], sides[1], config.concept or "", seeds)


def dictionaries(pipe: Any, pattern: str, folder: Path | None) -> dict[str, Sae]:
    """Load the dictionaries of the sites of a pattern that have one, by alias.

    Args:
        pipe: the pipeline.
        pattern: comma list of sites.
        folder: its files are named as in the zoo, `cross-6.safetensors`; None = those of the zoo.

    Raises:
        InputError: no site of the pattern has one.
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
        raise InputError(
            f"dictionaries: expected a dictionary in {where} for one of {', '.join(chosen)}, got "
            "none"
        )
    return found


def run(config: VectorConfig) -> SteeringVector:
    """Make the vector and save it to `config.out` (safetensors)."""
    pipe, _ = common.load(config.model, config.device, config.dtype)
    vector = build(pipe, config)
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        vector.save(config.out)
    return vector
