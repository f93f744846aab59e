# SPDX-License-Identifier: Apache-2.0
"""Localization by activation patching, all presets of a prompt pair in one batch.

Every row starts from the corrupted prompt; a row's preset names the cross-attention sites that see
the clean prompt instead, in the conditional pass and at every step (TADA, arXiv 2602.11910). No
clean run is needed, because what a site sees of a prompt is the same at every step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..._errors import InputError
from ...io.run_folder import RunFolder
from ...pipelines import SiteList
from ...pipelines import sites as list_sites
from ...scorers import Samples, Scorer, read_scores
from ...taps import patch
from ...zoo.music.concepts import concept
from .. import common, memory, models
from ..models import Context, Subject
from ..processes import Processes, in_pieces
from .analyse import Localization, analyse
from .config import LocalizationConfig
from .presets import Preset, clip_name, row_masks, single_presets, top_presets, window_presets

Job = tuple["Pair", Preset]


@dataclass(frozen=True)
class Pair:
    """One clean and one corrupted prompt, its number, and the text that scorers compare with."""

    index: int
    clean: str
    corrupted: str
    text: str = ""


@dataclass(frozen=True)
class Study:
    """What all parts of a localization work with."""

    config: LocalizationConfig
    folder: RunFolder
    subject: Subject
    scorers: Mapping[str, Scorer]
    processes: Processes


def pairs_of(config: LocalizationConfig, name: str) -> list[Pair]:
    """Return the prompt pairs of a concept: the given ones, or held-out ones of its templates."""
    if config.prompts is not None:
        given = [tuple(pair) for pair in config.prompts[name]][: config.pairs]
    else:
        drawn = concept(name).pairs(config.pairs, common.LOCALIZE_PROMPTS)
        given = [(pair.clean, pair.corrupted) for pair in drawn]
    return [Pair(index, *pair) for index, pair in enumerate(given)]


def run(config: LocalizationConfig) -> Localization:
    """Measure, analyse and write everything into `config.out`; a cut-off run continues.

    Under `torchrun` the processes share the batches; the tables are those of one process.

    Raises:
        ValueError: unknown concept or site, or `out` holds a run with other settings.
    """
    config.check_prompts()
    processes = Processes.of_environment()
    subject = models.load(replace(config, device=processes.device(config.device)))
    if config.prompts is None and not subject.zoo:
        raise InputError(
            f"--prompts: expected prompt pairs for {config.model} [only the zoo's music model has "
            "some of its own], got none"
        )
    scorers = common.load_scorers(config, subject)
    names = _sites(subject, config).aliases
    presets = single_presets(names) + window_presets(names, config.windows)
    inputs = common.inputs(config)
    folder = processes.open(
        lambda lock: RunFolder(config.out, "localize", config, inputs, lock=lock)
    )
    first = pairs_of(config, config.concepts[0])[0].corrupted
    rows = memory.batch_rows(config, subject, first, processes)
    study = Study(replace(config, batch_rows=rows), folder, subject, scorers, processes)
    everywhere = dict.fromkeys(config.concepts, presets)
    parts = _measure(study, everywhere, "sites", config.seeds)
    asked: dict[str, Any] = {
        **{"concepts": config.concepts, "seeds": config.seeds},
        **{"tau": config.tau, "model": config.model},
    }
    ranking = analyse(names, parts, **asked)
    top = {name: top_presets(order) for name, order in ranking.orders.items()}
    if len(names) > 1:
        cumulative = _measure(study, top, "top", config.seeds[:1])
        parts = pd.concat([parts, cumulative], ignore_index=True)
    result = analyse(names, parts, **asked)
    if processes.first:
        result.write(config.out)
    processes.wait()
    return result


def _sites(subject: Subject, config: LocalizationConfig) -> SiteList:
    return list_sites(subject.pipe, common.site_patterns(config.sites), kind="cross")


def _measure(
    study: Study, presets: Mapping[str, Sequence[Preset]], stage: str, seeds: Sequence[int]
) -> pd.DataFrame:
    """Score every concept with its own presets, part by part."""
    config, processes = study.config, study.processes
    tables = []
    work = [(name, seed) for seed in seeds for name in config.concepts]
    total = sum(len(pairs_of(config, name)) * len(presets[name]) for name, _ in work)
    with tqdm(
        total=total, desc=f"localize: {stage}", unit="clip", disable=not processes.first
    ) as progress:
        for name, seed in work:
            label = f"{stage}-{common.slug(name)}-{seed}"
            jobs = [(pair, one) for pair in pairs_of(config, name) for one in presets[name]]
            measure = Measure(study, name, seed)
            rows = int(config.batch_rows)
            tables.append(in_pieces(study.folder, processes, label, jobs, rows, measure, progress))
    return pd.concat(tables, ignore_index=True)


class Measure:
    """Scores jobs of a concept; its prompts are read when the first of them come.

    Args:
        study: what to work with.
        name: of the concept.
        seed: of the noise.
    """

    def __init__(self, study: Study, name: str, seed: int) -> None:
        self._study, self._name, self._seed = study, name, seed
        self._prompts: tuple[Mapping[int | None, Context], Any, list[Pair]] | None = None

    def __call__(self, chunk: Sequence[Job]) -> pd.DataFrame:
        """Score every pair and preset.

        Columns: concept, preset, pair, seed, scorer, score and, where all scorers give one,
        probability (of the concept). The score of a probability is its log-odds: like the
        alignment scores of the published method it does not saturate, so partial effects of single
        sites can be seen. Other scores stand as they are.
        """
        study, config = self._study, self._study.config
        if self._prompts is None:
            self._prompts = read_prompts(config, study.subject, self._name)
        clean, encoded, fillers = self._prompts
        jobs = [*chunk, *((pair, Preset("none", ())) for pair in fillers)]
        rows = [pair.index for pair, _ in jobs]
        samples = generate(
            config,
            study.subject,
            jobs,
            {source: part.take(rows) for source, part in clean.items()},
            encoded[rows],
            self._seed,
        ).first(len(chunk))
        if config.audio and self._seed == config.seeds[0]:
            heard = {
                clip_name(self._name, preset.name): place
                for place, (pair, preset) in enumerate(chunk)
                if pair.index == 0
            }
            common.write_clips(config.out, samples, heard)
        scorers = study.scorers.values()
        probabilities = all(scorer.unit == "probability" for scorer in scorers)
        tables = [self._table(chunk, samples, scorer, probabilities) for scorer in scorers]
        return pd.concat(tables, ignore_index=True)

    def _table(
        self, chunk: Sequence[Job], samples: Samples, scorer: Scorer, probabilities: bool
    ) -> pd.DataFrame:
        own = scorer.classes is not None
        texts = [self._name if own else pair.text or self._name for pair, _ in chunk]
        unique = list(dict.fromkeys(texts))
        found = read_scores(scorer, samples, unique).numpy()
        values = found[range(len(chunk)), [unique.index(text) for text in texts]]
        columns: dict[str, Any] = {
            "concept": self._name,
            "preset": [preset.name for _, preset in chunk],
            "pair": [pair.index for pair, _ in chunk],
            "seed": self._seed,
            "scorer": scorer.name,
        }
        if probabilities:
            columns["probability"] = values
        odds = scorer.unit == "probability"
        return pd.DataFrame({**columns, "score": common.log_odds(values) if odds else values})


def read_prompts(
    config: LocalizationConfig, subject: Subject, name: str
) -> tuple[dict[int | None, Context], Any, list[Pair]]:
    """Encode the prompts of a concept.

    Returns:
        What sites see of the clean prompts by source, the corrupted prompts encoded, and
        pairs that have to be in every batch so that all texts are padded alike; these come last.
    """
    pairs = pairs_of(config, name)
    call = subject.call(config.steps, config.guidance)
    first = {site.source: site.alias for site in reversed(_sites(subject, config))}
    texts = [text for pair in pairs for text in (pair.clean, pair.corrupted)]
    fillers = [
        Pair(len(pairs) + number, text, text)
        for number, text in enumerate(subject.fillers(texts, **call))
    ]
    every = [*pairs, *fillers]
    clean = {
        source: subject.contexts([pair.clean for pair in every], site, **call)
        for source, site in first.items()
    }
    return clean, subject.encode([pair.corrupted for pair in every]), fillers


def generate(
    config: LocalizationConfig,
    subject: Subject,
    jobs: Sequence[Job],
    clean: Mapping[int | None, Context],
    encoded: Any,
    seed: int,
) -> Samples:
    """Generate a sample for each job: at the sites of its preset it sees the clean prompt.

    Args:
        config: what is swapped, and how to sample.
        subject: the model.
        jobs: pair and preset of each row.
        clean: contexts of the clean prompts by source.
        encoded: the corrupted prompts, a row for each job.
        seed: of the repetition.
    """
    touched = {name for _, preset in jobs for name in preset.sites}
    seeds = [common.noise_seed(seed, pair.index) for pair, _ in jobs]
    with contextlib.ExitStack() as stack:
        for source, context in clean.items():
            order = [
                site.alias
                for site in _sites(subject, config)
                if site.source == source and site.alias in touched
            ]
            if order:
                masks = row_masks([preset for _, preset in jobs], order)
                given = context.given(config.how)
                stack.enter_context(patch(subject.pipe, order, rows=masks, **given))
        return subject.generate(encoded, seeds, **subject.call(config.steps, config.guidance))


def check_equal(subject: Subject, config: LocalizationConfig, name: str) -> dict[str, float]:
    """Measure differences that should be zero: all - clean generation, none - corrupted one.

    Both sides are encoded and generated in batches of one size, so the first two are exact; the
    third compares a batch with single generations, relative to the largest latent.
    """
    pair = pairs_of(config, name)[0]
    sites = _sites(subject, config)
    presets = single_presets(sites.aliases)
    count = len(presets)
    jobs = [(pair, preset) for preset in presets]
    call = subject.call(config.steps, config.guidance)
    source, site = sites[0].source, sites[0].alias
    clean = {source: subject.contexts([pair.clean] * count, site, **call)}
    corrupted = subject.encode([pair.corrupted] * count)
    seeds = [common.noise_seed(0, pair.index)] * count
    batch = _latents(generate(config, subject, jobs, clean, corrupted, 0))
    one = {source: clean[source].take(slice(1))}
    single = [_latents(generate(config, subject, [job], one, corrupted[:1], 0)) for job in jobs]
    full, none = (
        _latents(subject.generate(encoded, seeds, **call))
        for encoded in (subject.encode([pair.clean] * count), corrupted)
    )
    return {
        "all_minus_clean": float((batch[1] - full[1]).abs().max()),
        "none_minus_corrupted": float((batch[0] - none[0]).abs().max()),
        "batched_minus_single": float((batch - torch.cat(single)).abs().max() / batch.abs().max()),
    }


def _latents(samples: Samples) -> Tensor:
    if samples.latents is None:
        raise InputError("check_equal: expected a model that leaves latents, got decoded samples")
    return samples.latents
