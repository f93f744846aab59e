# SPDX-License-Identifier: Apache-2.0
"""Strength sweeps: every strength and arm of a prompt is a row of one batch.

Arms: the vector at the localized sites, at all sites, at all sites but the localized ones, and a
random direction of the same norm at the localized sites. Strength 0 is generated once for all arms.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..._errors import InputError
from ...io.run_folder import RunFolder
from ...metrics.distance import feature_distance
from ...pipelines import sites as list_sites
from ...taps import Where, steer
from ...vectors import SteeringVector
from ...zoo.music.concepts import CONCEPTS, Concept, concept
from .. import common
from ..vectors.config import VectorConfig
from ..vectors.run import build, dictionaries
from .analyse import Steering, analyse, clip_name
from .config import SteeringConfig


@dataclass(frozen=True)
class Row:
    """One clip of a sweep."""

    prompt: int
    arm: str
    strength: float


def run(config: SteeringConfig) -> Steering:
    """Sweep, analyse and write tables (and clips) into `config.out`; a cut-off run continues.

    Raises:
        ValueError: neither concept nor vector, a vector of another model, unknown sites, or `out`
            holds a run with other settings.
    """
    pipe, scorers = common.load(config.model, config.device, config.dtype)
    given = None if config.vector is None else SteeringVector.load(config.vector, pipe)
    wanted = scored_concept(config, given)
    localized = localized_sites(pipe, config.sites, wanted.name)
    _check_sites(pipe, localized, _held_sites(config, pipe, given))
    folder = RunFolder(config.out, "steer", config, common.inputs(config))
    vector = given if given is not None else _make_vector(config, pipe, wanted, folder)
    readings = sweep(config, pipe, scorers, vector, wanted, localized, folder)
    result = analyse(readings, wanted, localized)
    result.write(config.out)
    return result


def scored_concept(config: SteeringConfig, given: SteeringVector | None) -> Concept:
    """Return the concept that the classifiers read: the one steered, unless `scored_as` names it.

    Raises:
        InputError: neither a concept nor a vector, or one that no classifier knows.
    """
    name = config.concept or (given.concept if given is not None else None)
    if name is None and config.scored_as is None:
        raise InputError("steer: expected a concept or a vector file, got neither")
    if config.scored_as is not None:
        return concept(config.scored_as)
    if given is not None and name not in CONCEPTS:
        raise InputError(
            f"--scored-as: expected one of {', '.join(CONCEPTS)} [what the classifiers score; the "
            f"vector {config.vector} is of {name!r}], got none"
        )
    return concept(name or "")


def localized_sites(pipe: Any, pattern: str | None, name: str) -> list[str]:
    """List the sites to steer a concept at, by alias: `pattern`, or those the zoo names for it."""
    if pattern is not None:
        return [site.alias for site in list_sites(pipe, common.site_patterns(pattern))]
    from ... import zoo

    return list(zoo.localized(name))


def _held_sites(config: SteeringConfig, pipe: Any, given: SteeringVector | None) -> Any:
    """List the sites that the vector has, or will have once it is made."""
    if given is not None:
        return given.sites
    if config.method == "sae":
        return list(dictionaries(pipe, VectorConfig.sites, config.dictionaries))
    return VectorConfig.sites


def _check_sites(pipe: Any, localized: Sequence[str], pattern: Any) -> None:
    held = list_sites(pipe, pattern)
    missing = [site for site in localized if site not in held.aliases]
    if missing:
        raise ValueError(
            f"steer: expected sites of {held.summary()} [those of the vector], got {missing[0]}"
        )


def _make_vector(
    config: SteeringConfig, pipe: Any, wanted: Concept, folder: RunFolder
) -> SteeringVector:
    saved = folder.path / "vector.safetensors"
    if saved.is_file():
        return SteeringVector.load(saved, pipe)
    made = build(
        pipe,
        VectorConfig(
            concept=config.concept or wanted.name,
            normalise=False,
            steps=config.steps,
            guidance=config.guidance,
            batch_rows=config.batch_rows,
            seed=config.seed,
            method=config.method,
            dictionaries=config.dictionaries,
            features=config.features,
            score=config.score,
            weighting=config.weighting,
        ),
    )
    made.save(saved)
    return made


def test_prompts(config: SteeringConfig, wanted: Concept) -> list[str]:
    """Return held-out prompts without the concept: the given ones, or from its templates."""
    if isinstance(config.prompts, int):
        pairs = wanted.pairs(config.prompts, common.TEST_PROMPTS)
        return [pair.corrupted for pair in pairs]
    return list(config.prompts)


def sweep(
    config: SteeringConfig,
    pipe: Any,
    scorers: Mapping[str, Any],
    vector: SteeringVector,
    wanted: Concept,
    localized: Sequence[str],
    folder: RunFolder | None = None,
) -> pd.DataFrame:
    """Score every clip; batches that are parts of `folder` are not generated again.

    Columns: prompt, text, arm, strength, scorer, score (P(concept)), distance (to the clip of
    strength 0), and for every other attribute `<attribute>_kept`, 1 where the most probable class
    is that of the clip of strength 0.
    """
    prompts = test_prompts(config, wanted)
    strengths = [s for s in config.strengths if s != 0.0]
    per_prompt = [Row(0, "none", 0.0)]
    per_prompt += [Row(0, arm, strength) for arm in config.arms for strength in strengths]
    group = max(1, config.batch_rows // len(per_prompt))
    tables = []
    with tqdm(
        total=len(prompts) * len(per_prompt), desc=f"steer: {wanted.name}", unit="clip"
    ) as progress:
        for numbers in common.batches(range(len(prompts)), group):
            rows = [Row(n, row.arm, row.strength) for n in numbers for row in per_prompt]
            label = f"sweep-{numbers[0]:03d}"
            part = None if folder is None else common.finished(folder, label)
            if part is None:
                latents = generate_rows(config, pipe, vector, localized, prompts, rows)
                if config.audio:
                    write_audio(config.out, pipe, latents, rows)
                part = _read(scorers, latents, rows, prompts, wanted)
                if folder is not None:
                    part = folder.save_part(label, part)
            tables.append(part)
            progress.update(len(rows))
    return pd.concat(tables, ignore_index=True)


def generate_rows(
    config: SteeringConfig,
    pipe: Any,
    vector: SteeringVector,
    localized: Sequence[str],
    prompts: Sequence[str],
    rows: Sequence[Row],
) -> Tensor:
    """Generate the latents of the rows, steered in one batch."""
    every = [site.alias for site in list_sites(pipe, vector.sites)]
    plans = {
        "localized": (vector, list(localized)),
        "all": (vector, every),
        "ablated": (vector, [site for site in every if site not in localized]),
        "random": (vector.random_like(config.seed), list(localized)),
    }
    used = list(dict.fromkeys(row.prompt for row in rows))
    encoded = pipe.encode_prompt([prompts[n] for n in used])
    encoded = encoded[[used.index(row.prompt) for row in rows]]
    seeds = [common.noise_seed(config.seed, row.prompt) for row in rows]
    with contextlib.ExitStack() as stack:
        for arm, (direction, chosen) in plans.items():
            strength = [row.strength if row.arm == arm else 0.0 for row in rows]
            if any(strength) and chosen:
                stack.enter_context(
                    steer(
                        pipe,
                        direction,
                        Where(chosen, config.branches),
                        strength=strength,
                        renorm=config.renorm,
                    )
                )
        return common.generate(pipe, encoded, seeds, steps=config.steps, guidance=config.guidance)


def _read(
    scorers: Mapping[str, Any],
    latents: Tensor,
    rows: Sequence[Row],
    prompts: Sequence[str],
    wanted: Concept,
) -> pd.DataFrame:
    found = common.readings(scorers, latents)
    start = {row.prompt: index for index, row in enumerate(rows) if row.arm == "none"}
    origin = [start[row.prompt] for row in rows]
    tables = []
    for name, scorer in scorers.items():
        with torch.no_grad():
            stages = scorer.stages(latents.float())
            distance = feature_distance(stages, [stage[origin] for stage in stages])
        table = pd.DataFrame(
            {
                "concept": wanted.name,
                "prompt": [row.prompt for row in rows],
                "text": [prompts[row.prompt] for row in rows],
                "arm": [row.arm for row in rows],
                "strength": [row.strength for row in rows],
                "scorer": name,
                "score": found[name][wanted.attribute][:, wanted.class_index],
                "distance": np.where(
                    [row.arm == "none" for row in rows], 0.0, distance.double().cpu().numpy()
                ),
            }
        )
        for attribute, values in found[name].items():
            if attribute != wanted.attribute:
                classes = values.argmax(axis=1)
                table[f"{attribute}_kept"] = (classes == classes[origin]).astype(float)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def write_audio(out: Path, pipe: Any, latents: Tensor, rows: Sequence[Row]) -> None:
    """Write the clips of rows where the page looks for them."""
    names = [clip_name(row.prompt, row.arm, row.strength) for row in rows]
    common.write_clips(out, pipe, dict(zip(names, latents, strict=True)))
