# SPDX-License-Identifier: Apache-2.0
"""Localization by activation patching, all presets of a prompt pair in one batch.

Every row starts from the corrupted prompt; a row's preset names the cross-attention sites that see
the clean prompt instead, in the conditional pass and at every step (TADA, arXiv 2602.11910). No
clean run is needed, because what a site sees of a prompt is the same at every step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...io.run_folder import RunFolder
from ...pipelines import sites as list_sites
from ...taps import contexts, patch
from ...zoo.music.concepts import concept
from .. import common
from .analyse import Localization, analyse
from .config import LocalizationConfig
from .presets import Preset, clip_name, row_masks, single_presets, top_presets, window_presets


@dataclass(frozen=True)
class Pair:
    """One clean and one corrupted prompt, its number and the encoded prompts."""

    index: int
    clean: str
    corrupted: str


def pairs_of(config: LocalizationConfig, name: str) -> list[Pair]:
    """Return the prompt pairs of a concept: the given ones, or held-out ones of its templates."""
    if config.prompts is not None:
        given = list(config.prompts[name])[: config.pairs]
    else:
        drawn = concept(name).pairs(config.pairs, common.LOCALIZE_PROMPTS)
        given = [(pair.clean, pair.corrupted) for pair in drawn]
    return [Pair(index, clean, corrupted) for index, (clean, corrupted) in enumerate(given)]


def run(config: LocalizationConfig) -> Localization:
    """Measure, analyse and write everything into `config.out`; a cut-off run continues.

    Raises:
        ValueError: unknown concept or site, or `out` holds a run with other settings.
    """
    for name in config.concepts:
        concept(name)
    config.check_prompts()
    pipe, scorers = common.load(config.model, config.device, config.dtype)
    names = _site_names(pipe, config)
    presets = single_presets(names) + window_presets(names, config.windows)
    folder = RunFolder(config.out, "localize", config, common.inputs(config))
    everywhere = dict.fromkeys(config.concepts, presets)
    parts = _measure(config, folder, pipe, scorers, everywhere, "sites", config.seeds)
    asked: dict[str, Any] = {"concepts": config.concepts, "seeds": config.seeds, "tau": config.tau}
    ranking = analyse(names, parts, **asked)
    top = {name: top_presets(order) for name, order in ranking.orders.items()}
    if len(names) > 1:
        cumulative = _measure(config, folder, pipe, scorers, top, "top", config.seeds[:1])
        parts = pd.concat([parts, cumulative], ignore_index=True)
    result = analyse(names, parts, **asked)
    result.write(config.out)
    return result


def _site_names(pipe: Any, config: LocalizationConfig) -> list[str]:
    patterns = common.site_patterns(config.sites)
    return [site.alias for site in list_sites(pipe, patterns, kind="cross")]


def _measure(
    config: LocalizationConfig,
    folder: RunFolder,
    pipe: Any,
    scorers: Mapping[str, Any],
    presets: Mapping[str, Sequence[Preset]],
    stage: str,
    seeds: Sequence[int],
) -> pd.DataFrame:
    """Score every concept with its own presets, part by part."""
    tables = []
    work = [(name, seed) for seed in seeds for name in config.concepts]
    total = sum(len(pairs_of(config, name)) * len(presets[name]) for name, _ in work)
    with tqdm(total=total, desc=f"localize: {stage}", unit="clip") as progress:
        for name, seed in work:
            label = f"{stage}-{name}-{seed}"
            part = common.finished(folder, label)
            if part is None:
                rows = score_presets(config, pipe, scorers, name, seed, presets[name], progress)
                part = folder.save_part(label, rows)
            else:
                progress.update(part.preset.size // len(scorers))
            tables.append(part)
    return pd.concat(tables, ignore_index=True)


def score_presets(
    config: LocalizationConfig,
    pipe: Any,
    scorers: Mapping[str, Any],
    name: str,
    seed: int,
    presets: Sequence[Preset],
    progress: Any = None,
) -> pd.DataFrame:
    """Score every pair and preset.

    Columns: concept, preset, pair, seed, scorer, probability (of the concept) and score, its
    log-odds: like the alignment scores of the published method it does not saturate, so partial
    effects of single sites can be seen.
    """
    wanted = concept(name)
    pairs = pairs_of(config, name)
    clean = contexts(pipe, [pair.clean for pair in pairs])
    encoded = pipe.encode_prompt([pair.corrupted for pair in pairs])
    jobs = [(pair, preset) for pair in pairs for preset in presets]
    tables = []
    for chunk in common.batches(jobs, config.batch_rows):
        rows = [pair.index for pair, _ in chunk]
        latents = _generate(config, pipe, chunk, clean[rows], encoded[rows], seed)
        if config.audio and seed == config.seeds[0]:
            heard = {
                clip_name(name, preset.name): latents[index]
                for index, (pair, preset) in enumerate(chunk)
                if pair.index == 0
            }
            common.write_clips(config.out, pipe, heard)
        for scorer, found in common.readings(scorers, latents).items():
            probability = found[wanted.attribute][:, wanted.class_index]
            tables.append(
                pd.DataFrame(
                    {
                        "concept": name,
                        "preset": [preset.name for _, preset in chunk],
                        "pair": rows,
                        "seed": seed,
                        "scorer": scorer,
                        "probability": probability,
                        "score": common.log_odds(probability),
                    }
                )
            )
        if progress is not None:
            progress.update(len(chunk))
    return pd.concat(tables, ignore_index=True)


def _generate(
    config: LocalizationConfig,
    pipe: Any,
    chunk: Sequence[tuple[Pair, Preset]],
    clean: Tensor,
    encoded: Tensor,
    seed: int,
) -> Tensor:
    touched = {name for _, preset in chunk for name in preset.sites}
    order = [name for name in _site_names(pipe, config) if name in touched]
    seeds = [common.noise_seed(seed, pair.index) for pair, _ in chunk]
    with contextlib.ExitStack() as stack:
        if order:
            masks = row_masks([preset for _, preset in chunk], order)
            source: dict[str, Any] = {config.how: clean}
            stack.enter_context(patch(pipe, order, rows=masks, **source))
        return common.generate(pipe, encoded, seeds, steps=config.steps, guidance=config.guidance)


def check_equal(pipe: Any, config: LocalizationConfig, name: str) -> dict[str, float]:
    """Measure differences that should be zero: all - clean generation, none - corrupted one.

    Both sides are encoded and generated in batches of one size, so the first two are exact; the
    third compares a batch with single generations, relative to the largest latent.
    """
    pair = pairs_of(config, name)[0]
    presets = single_presets(_site_names(pipe, config))
    count = len(presets)
    jobs = [(pair, preset) for preset in presets]
    clean = contexts(pipe, [pair.clean] * count)
    corrupted = pipe.encode_prompt([pair.corrupted] * count)
    seeds = [common.noise_seed(0, pair.index)] * count
    batch = _generate(config, pipe, jobs, clean, corrupted, 0)
    single = [_generate(config, pipe, [job], clean[:1], corrupted[:1], 0) for job in jobs]
    full, none = (
        common.generate(pipe, encoded, seeds, steps=config.steps, guidance=config.guidance)
        for encoded in (pipe.encode_prompt([pair.clean] * count), corrupted)
    )
    return {
        "all_minus_clean": float((batch[1] - full[1]).abs().max()),
        "none_minus_corrupted": float((batch[0] - none[0]).abs().max()),
        "batched_minus_single": float((batch - torch.cat(single)).abs().max() / batch.abs().max()),
    }
