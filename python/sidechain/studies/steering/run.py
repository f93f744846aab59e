# SPDX-License-Identifier: Apache-2.0
"""Strength sweeps: every strength and arm of a prompt is a row of one batch.

Arms: the vector at the localized sites, at all sites, at all sites but the localized ones, and a
random direction of the same norm at the localized sites. Strength 0 is generated once for all arms.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from ..._errors import InputError
from ...io.run_folder import RunFolder
from ...pipelines import sites as list_sites
from ...scorers import Distance, FeatureDistance, Samples, Scorer, load_distance, read_scores
from ...scorers.zoo import ZooScorer
from ...taps import Where, steer
from ...vectors import SteeringVector
from ...zoo.music.concepts import CONCEPTS, Concept, concept
from .. import common, memory, models
from ..models import Subject
from ..processes import Processes, joined
from ..vectors.config import VectorConfig
from ..vectors.run import build, dictionaries
from .analyse import PROMPT, Steering, Target, Wanted, analyse, clip_name
from .config import SteeringConfig


@dataclass(frozen=True)
class Row:
    """One clip of a sweep."""

    prompt: int
    arm: str
    strength: float


@dataclass(frozen=True)
class Study:
    """What all batches of a sweep work with.

    Attributes:
        config: settings, the rows of a batch settled.
        subject: the model.
        scorers: by name.
        distances: by name of the scorer.
        wanted: what is steered towards.
        processes: that share the batches.
    """

    config: SteeringConfig
    subject: Subject
    scorers: Mapping[str, Scorer]
    distances: Mapping[str, Distance]
    wanted: Wanted
    processes: Processes = Processes()  # noqa: RUF009 - frozen, one process


def run(config: SteeringConfig) -> Steering:
    """Sweep, analyse and write tables (and clips) into `config.out`; a cut-off run continues.

    Under `torchrun` the processes share the batches; the tables are those of one process.

    Raises:
        ValueError: neither concept nor vector, a vector of another model, unknown sites, or `out`
            holds a run with other settings.
    """
    processes = Processes.of_environment()
    subject = models.load(replace(config, device=processes.device(config.device)))
    scorers = common.load_scorers(config, subject)
    given = None if config.vector is None else SteeringVector.load(config.vector, subject.pipe)
    wanted = scored_concept(config, given, subject, scorers)
    localized = localized_sites(subject, config.sites, wanted.name)
    _check_sites(subject.pipe, localized, _held_sites(config, subject, given))
    prompts = test_prompts(config, wanted, subject)
    distances = load_distances(config, scorers, subject)
    inputs = common.inputs(config)
    folder = processes.open(lambda lock: RunFolder(config.out, "steer", config, inputs, lock=lock))
    rows = memory.batch_rows(config, subject, prompts[0], processes)
    config = replace(config, batch_rows=rows)
    vector = given
    if vector is None:
        if processes.first:
            _make_vector(config, subject, wanted, folder)
        processes.wait()
        vector = _make_vector(config, subject, wanted, folder)
    study = Study(config, subject, scorers, distances, wanted, processes)
    readings = sweep(study, vector, localized, prompts, folder)
    result = analyse(readings, wanted, localized)
    if processes.first:
        result.write(config.out)
    processes.wait()
    return result


def scored_concept(
    config: SteeringConfig,
    given: SteeringVector | None,
    subject: Subject,
    scorers: Mapping[str, Scorer],
) -> Wanted:
    """Return what scorers read: the concept steered, unless the settings say otherwise.

    Raises:
        InputError: neither a concept nor a vector, a concept for a model without any, one that no
            classifier knows, or scorers of classes beside scorers of texts.
    """
    name = config.concept or (given.concept if given is not None else None)
    if name is None and config.scored_as is None:
        raise InputError("steer: expected a concept or a vector file, got neither")
    if given is None and not subject.zoo:
        raise InputError(
            f"--vector: expected a file for {subject.name} [only the zoo's music model has prompts "
            "of concepts to make one of; sidechain vector --prompts makes it], got --concept"
        )
    classes = {one.classes is not None for one in scorers.values()}
    if len(classes) > 1:
        raise InputError(
            "--scorer: expected zoo alone or others alone [classes cannot be read like texts], got "
            f"{', '.join(scorers)}"
        )
    if classes == {False}:
        label = name or config.scored_text or "the vector"
        return Target(label, config.scored_text or label)
    if config.scored_text is not None:
        raise InputError("--scored-text: expected a scorer that reads texts [clap, clip], got zoo")
    if config.scored_as is not None:
        return concept(config.scored_as)
    if given is not None and name not in CONCEPTS:
        raise InputError(
            f"--scored-as: expected one of {', '.join(CONCEPTS)} [what the classifiers score; the "
            f"vector {config.vector} is of {name!r}], got none"
        )
    return concept(name or "")


def localized_sites(subject: Subject, pattern: str | None, name: str) -> list[str]:
    """List the sites to steer a concept at, by alias: `pattern`, or those the zoo names for it.

    Raises:
        InputError: no pattern for a model without a shipped localization.
    """
    if pattern is not None:
        return [site.alias for site in list_sites(subject.pipe, common.site_patterns(pattern))]
    if not subject.zoo:
        raise InputError(
            f"--sites: expected the localized sites for {subject.name} [only the zoo's music model "
            "has a localization that ships; sidechain localize finds them], got none"
        )
    from ... import zoo

    return list(zoo.localized(name))


def load_distances(
    config: SteeringConfig, scorers: Mapping[str, Scorer], subject: Subject
) -> dict[str, Distance]:
    """Return the distance that stands beside the scores of each scorer.

    Raises:
        InputError: one that cannot be loaded, or features of a scorer that has none.
    """
    if config.distance != "scorer":
        return dict.fromkeys(scorers, load_distance(config.distance, subject.device))
    blind = [one.name for one in scorers.values() if not one.mapped]
    if blind:
        raise InputError(
            f"--distance: expected spectral, lpips, clap:... or clip:... [the scorer {blind[0]} is "
            "a function, which has no feature maps], got scorer"
        )
    return {name: FeatureDistance(scorer) for name, scorer in scorers.items()}


def _held_sites(config: SteeringConfig, subject: Subject, given: SteeringVector | None) -> Any:
    """List the sites that the vector has, or will have once it is made."""
    if given is not None:
        return given.sites
    if config.method == "sae":
        return list(dictionaries(subject, VectorConfig.sites, config.dictionaries))
    return VectorConfig.sites


def _check_sites(pipe: Any, localized: Sequence[str], pattern: Any) -> None:
    held = list_sites(pipe, pattern)
    missing = [site for site in localized if site not in held.aliases]
    if missing:
        raise ValueError(
            f"steer: expected sites of {held.summary()} [those of the vector], got {missing[0]}"
        )


def _make_vector(
    config: SteeringConfig, subject: Subject, wanted: Wanted, folder: RunFolder
) -> SteeringVector:
    saved = folder.path / "vector.safetensors"
    if saved.is_file():
        return SteeringVector.load(saved, subject.pipe)
    made = build(
        subject,
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


def test_prompts(config: SteeringConfig, wanted: Wanted, subject: Subject) -> list[str]:
    """Return held-out prompts without the concept: the given ones, or from the zoo's templates.

    Raises:
        InputError: a number, for a model or a concept without templates.
    """
    if not isinstance(config.prompts, int):
        return list(config.prompts)
    if not subject.zoo:
        raise InputError(
            f"--prompts: expected a text file for {subject.name} [only the zoo's music model has "
            f"prompts of its own], got the number {config.prompts}"
        )
    one = wanted if isinstance(wanted, Concept) else concept(wanted.name)
    return [pair.corrupted for pair in one.pairs(config.prompts, common.TEST_PROMPTS)]


def sweep(
    study: Study,
    vector: SteeringVector,
    localized: Sequence[str],
    prompts: Sequence[str],
    folder: RunFolder,
) -> pd.DataFrame:
    """Score every clip; batches that are parts of `folder` are not generated again.

    Columns: prompt, text, arm, strength, scorer, score (P(concept), or what a scorer of texts
    says), distance (to the clip of strength 0), and what is kept. For classes that is, for every
    other attribute, `<attribute>_kept`: 1 where the most probable class is that of the clip of
    strength 0. For texts it is `prompt_kept`: 1 where the closest of all prompts is the same.
    """
    config, processes = study.config, study.processes
    strengths = [s for s in config.strengths if s != 0.0]
    per_prompt = [Row(0, "none", 0.0)]
    per_prompt += [Row(0, arm, strength) for arm in config.arms for strength in strengths]
    group = max(1, int(config.batch_rows) // len(per_prompt))
    parts = list(common.batches(range(len(prompts)), group))
    call = study.subject.call(config.steps, config.guidance)
    fillers = study.subject.fillers(prompts, **call)
    title = f"steer: {study.wanted.name}"
    total = len(prompts) * len(per_prompt)
    with tqdm(total=total, desc=title, unit="clip", disable=not processes.first) as progress:
        for place in range(processes.rank, len(parts), processes.size):
            rows = [Row(n, row.arm, row.strength) for n in parts[place] for row in per_prompt]
            if _finished(folder, parts[place]) is None:
                samples = generate_rows(
                    config, study.subject, vector, localized, prompts, rows, fillers
                )
                if config.audio:
                    write_audio(config.out, samples, rows)
                folder.save_part(_label(parts[place]), _read(study, samples, rows, prompts))
            progress.update(sum(map(len, parts[place : place + processes.size])) * len(per_prompt))
    processes.wait()
    return joined({_label(numbers): _finished(folder, numbers) for numbers in parts})


def _finished(folder: RunFolder, numbers: Sequence[int]) -> pd.DataFrame | None:
    """Return the part of these prompts, None if it is not there or is of others.

    With `--batch-rows auto` a run that continues may take more or fewer prompts at once.
    """
    part = common.finished(folder, _label(numbers))
    return None if part is None or set(part.prompt) != set(numbers) else part


def _label(numbers: Sequence[int]) -> str:
    return f"sweep-{numbers[0]:03d}"


def generate_rows(
    config: SteeringConfig,
    subject: Subject,
    vector: SteeringVector,
    localized: Sequence[str],
    prompts: Sequence[str],
    rows: Sequence[Row],
    fillers: Sequence[str] = (),
) -> Samples:
    """Generate the samples of the rows, steered in one batch.

    Args:
        config: arms, branches and how to sample.
        subject: the model.
        vector: what is added.
        localized: sites of the localized arm.
        prompts: all of the sweep.
        rows: prompt, arm and strength of each sample.
        fillers: prompts that have to be in every batch, see `Subject.fillers`.
    """
    every = [site.alias for site in list_sites(subject.pipe, vector.sites)]
    plans = {
        "localized": (vector, list(localized)),
        "all": (vector, every),
        "ablated": (vector, [site for site in every if site not in localized]),
        "random": (vector.random_like(config.seed), list(localized)),
    }
    texts = [*prompts, *fillers]
    batch = [*rows, *(Row(len(prompts) + n, "none", 0.0) for n in range(len(fillers)))]
    used = list(dict.fromkeys(row.prompt for row in batch))
    encoded = subject.encode([texts[n] for n in used])
    encoded = encoded[[used.index(row.prompt) for row in batch]]
    seeds = [common.noise_seed(config.seed, row.prompt) for row in batch]
    with contextlib.ExitStack() as stack:
        for arm, (direction, chosen) in plans.items():
            strength = [row.strength if row.arm == arm else 0.0 for row in batch]
            if any(strength) and chosen:
                stack.enter_context(
                    steer(
                        subject.pipe,
                        direction,
                        Where(chosen, config.branches),
                        strength=strength,
                        renorm=config.renorm,
                    )
                )
        call = subject.call(config.steps, config.guidance)
        return subject.generate(encoded, seeds, **call).first(len(rows))


def _read(
    study: Study, samples: Samples, rows: Sequence[Row], prompts: Sequence[str]
) -> pd.DataFrame:
    start = {row.prompt: index for index, row in enumerate(rows) if row.arm == "none"}
    origin = [start[row.prompt] for row in rows]
    plain = [row.arm == "none" for row in rows]
    tables = []
    for name, scorer in study.scorers.items():
        distance = study.distances[name].distance(samples, origin)
        score, kept = _scored(study, scorer, samples, origin, prompts)
        columns: dict[str, Any] = {
            "concept": study.wanted.name,
            "prompt": [row.prompt for row in rows],
            "text": [prompts[row.prompt] for row in rows],
            "arm": [row.arm for row in rows],
            "strength": [row.strength for row in rows],
            "scorer": name,
            "score": score,
            "distance": np.where(plain, 0.0, distance.double().cpu().numpy()),
        }
        tables.append(pd.DataFrame({**columns, **kept}))
    return pd.concat(tables, ignore_index=True)


def _scored(
    study: Study,
    scorer: Scorer,
    samples: Samples,
    origin: Sequence[int],
    prompts: Sequence[str],
) -> tuple[Any, dict[str, Any]]:
    """Return the scores [B], and columns of what is kept."""
    wanted = study.wanted
    if isinstance(wanted, Concept):
        score = read_scores(scorer, samples, [wanted.name])[:, 0].numpy()
        found = scorer.kept(samples, origin, wanted) if isinstance(scorer, ZooScorer) else {}
        return score, {f"{attribute}_kept": values for attribute, values in found.items()}
    texts = list(dict.fromkeys(prompts))
    values = read_scores(scorer, samples, [wanted.text, *texts]).numpy()
    closest = values[:, 1:].argmax(axis=1)
    return values[:, 0], {f"{PROMPT}_kept": (closest == closest[list(origin)]).astype(float)}


def write_audio(out: Path, samples: Samples, rows: Sequence[Row]) -> None:
    """Write the clips of rows where the page looks for them."""
    places = {clip_name(row.prompt, row.arm, row.strength): i for i, row in enumerate(rows)}
    common.write_clips(out, samples, places)
