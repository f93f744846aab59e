# SPDX-License-Identifier: Apache-2.0
"""Make a steering vector from the prompt pairs of a concept, or from given ones.

Two methods: "caa", the mean difference of the activations, and "sae", the decoder rows of the
dictionary features that score best.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from ..._errors import InputError
from ...pipelines import PromptPairs
from ...pipelines import sites as list_sites
from ...sae import Sae
from ...sae.features.scoring import feature_statistics
from ...taps import cache_context
from ...vectors import SteeringVector, caa, sae_features
from ...zoo.music.concepts import concept
from .. import common, memory, models
from ..models import Subject
from .config import VectorConfig as VectorConfig


def build(subject: Subject, config: VectorConfig, *, progress: bool = True) -> SteeringVector:
    """Build the vector of the concept in `config`, without saving it.

    Keys and values of the zoo's prompts are computed once in a generation, not at every step.

    Raises:
        InputError: neither concept nor prompts, or with "sae" a site without a dictionary.
    """
    pairs = prompt_pairs(config, subject)
    rows = memory.batch_rows(config, subject, pairs.positive[0])
    with cache_context(subject.pipe) if subject.zoo else contextlib.nullcontext():
        return _build(subject, config, pairs, max(1, rows // 2), progress)


def _build(
    subject: Subject, config: VectorConfig, pairs: PromptPairs, batch_size: int, progress: bool
) -> SteeringVector:
    call = subject.call(config.steps, config.guidance)
    call.pop("output_type", None)  # nothing is decoded
    if config.method == "caa":
        return caa(
            subject.pipe,
            pairs,
            common.site_patterns(config.sites),
            batch_size=batch_size,
            normalise=config.normalise,
            progress=progress,
            **call,
        )
    saes = dictionaries(subject, config.sites, config.dictionaries)
    statistics = feature_statistics(
        subject.pipe, saes, pairs, batch_size=batch_size, progress=progress, **call
    )
    return sae_features(
        subject.pipe,
        saes,
        statistics,
        pairs,
        method=config.score,
        count=config.features,
        weighting=config.weighting,
        **call,
    )


def prompt_pairs(config: VectorConfig, subject: Subject) -> PromptPairs:
    """Return prompts with and without the concept: given ones, or from the zoo's templates.

    Raises:
        InputError: neither concept nor prompts, or no prompts for a model that has no templates.
    """
    if config.prompts is None and not subject.zoo:
        raise InputError(
            f"--prompts: expected a CSV with columns positive,negative for {subject.name} [only "
            "the zoo's music model has prompts of its own], got none"
        )
    if config.prompts is None and config.concept is None:
        raise InputError("vector: expected a concept or prompts, got neither")
    if config.prompts is not None:
        sides = [list(side)[: config.pairs] for side in config.prompts]
    else:
        pairs = concept(config.concept or "").pairs(config.pairs, common.VECTOR_PROMPTS)
        sides = [[pair.clean for pair in pairs], [pair.corrupted for pair in pairs]]
    seeds = [common.noise_seed(config.seed, index) for index in range(len(sides[0]))]
    return PromptPairs(sides[0], sides[1], config.concept or "", seeds)


def dictionaries(subject: Subject, pattern: str, folder: Path | None) -> dict[str, Sae]:
    """Load the dictionaries of the sites of a pattern that have one, by alias.

    Args:
        subject: the model.
        pattern: comma list of sites.
        folder: its files are named as in the zoo, `cross-6.safetensors`; None = those of the zoo.

    Raises:
        InputError: no site of the pattern has one, or no folder for a model without shipped ones.
    """
    from ... import zoo

    if folder is None and not subject.zoo:
        raise InputError(
            f"--dictionaries: expected a folder for {subject.name} [only the zoo's music model has "
            "dictionaries that ship], got none"
        )
    chosen = list_sites(subject.pipe, common.site_patterns(pattern)).aliases
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
    vector = build(models.load(config), config)
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        vector.save(config.out)
    return vector
