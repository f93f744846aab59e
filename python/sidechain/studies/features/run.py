# SPDX-License-Identifier: Apache-2.0
"""Quality of dictionaries, and the features that represent concepts: `sidechain sae score`.

Held-out captions are generated once and recorded at all sites; every concept's prompt pairs are
read at all sites in one generation. The report plays the clips at which features are largest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from ..._errors import InputError
from ...io.run_folder import RunFolder, write_json, write_table
from ...report.data import Clip
from ...sae import Sae, SaeConfig
from ...sae.features.evaluate import Health, measure
from ...sae.features.scoring import (
    METHODS,
    FeatureStatistics,
    feature_statistics,
)
from ...sae.features.top import TopExample, top_examples
from ...store import ActivationStore, Sampling, record
from ...zoo.music.captions import fresh_captions
from ...zoo.music.compose import CLIP_SECONDS
from ...zoo.music.concepts import concept
from .. import common, models
from ..models import Subject
from ..vectors.config import VectorConfig
from ..vectors.run import dictionaries, prompt_pairs
from .config import DictionaryConfig
from .health import health_record, on_rows

#: Captions of the study are numbered from here: neither trained on nor held out by the recipe.
FIRST_CAPTION = 500_000


@dataclass(frozen=True)
class FeatureFound:
    """A feature that represents a concept at a site.

    Attributes:
        concept, site, feature: which.
        score: mean over steps of the method asked for.
        step: where that score is largest.
        kept: mean activation with and without the concept, mean over steps.
        rate: share of tokens at which it is active, with and without the concept.
        moments: where it is largest among the held-out captions.
    """

    concept: str
    site: str
    feature: int
    score: float
    step: int
    kept: tuple[float, float]
    rate: tuple[float, float]
    moments: list[TopExample]


@dataclass(frozen=True)
class DictionaryStudy:
    """Everything that `sidechain sae score` found."""

    config: DictionaryConfig
    health: dict[str, Health]
    found: list[FeatureFound]
    ranks: pd.DataFrame
    configs: dict[str, SaeConfig]

    def health_table(self) -> pd.DataFrame:
        """Return one row for each site."""
        return pd.DataFrame(
            [health_record(site, self.configs[site], one) for site, one in self.health.items()]
        )

    def feature_table(self) -> pd.DataFrame:
        """Return one row for each feature found."""
        return pd.DataFrame(
            [
                {
                    "concept": f.concept,
                    "site": f.site,
                    "feature": f.feature,
                    "score": f.score,
                    "best_step": f.step,
                    "kept_with": f.kept[0],
                    "kept_without": f.kept[1],
                    "rate_with": f.rate[0],
                    "rate_without": f.rate[1],
                }
                for f in self.found
            ]
        )

    def write(self, out: Path) -> None:
        """Write `health.csv`, `features.csv`, `scores.csv` and `summary.json`."""
        write_table(out / "health.csv", self.health_table())
        write_table(out / "features.csv", self.feature_table())
        write_table(out / "scores.csv", self.ranks)
        write_json(
            out / "summary.json",
            {
                "sites": self.health_table().to_dict(orient="records"),
                "concepts": list(self.config.concepts),
                "pairs": self.config.pairs,
                "captions": self.config.prompts,
                "fvu_by_step": {
                    site: [round(float(v), 5) for v in h.step_fvu]
                    for site, h in self.health.items()
                },
            },
        )


def run(config: DictionaryConfig) -> DictionaryStudy:
    """Measure, score and write tables into `config.out`; recorded captions are used again.

    Raises:
        ValueError: an unknown concept or score, or no dictionary for these sites.
    """
    wanted = [concept(name) for name in config.concepts]
    subject = load(config)
    saes = dictionaries(subject, config.sites, config.dictionaries)
    _held = RunFolder(config.out, "sae score", config, common.inputs(config))
    stores = record_captions(config, subject.pipe, list(saes))
    health = {site: measure(on_rows(sae, stores[site]), stores[site]) for site, sae in saes.items()}
    found: list[FeatureFound] = []
    tables = []
    for one in wanted:
        statistics = _statistics(config, subject, saes, one.name)
        for site, read in statistics.items():
            found += _best(config, one.name, site, saes[site], read, stores[site])
        tables.append(_scores(one.name, statistics))
    configs = {site: sae.config for site, sae in saes.items()}
    study = DictionaryStudy(config, health, found, pd.concat(tables, ignore_index=True), configs)
    study.write(config.out)
    return study


def load(config: DictionaryConfig) -> Subject:
    """Load the model.

    Raises:
        InputError: another model than the zoo's.
    """
    subject = models.load(config)
    if not subject.zoo:
        raise InputError(
            f"sae score: expected the zoo's music model [concepts, captions and clips of the study "
            f"are its own], got {config.model}: measure a dictionary of another model with "
            "sidechain.sae.features.evaluate.measure on a store of `sidechain capture`"
        )
    return subject


def record_captions(
    config: DictionaryConfig, pipe: Any, sites: Sequence[str]
) -> dict[str, ActivationStore]:
    """Record the rows of the held-out captions by site."""
    return record(
        pipe,
        list(sites),
        fresh_captions(config.prompts, FIRST_CAPTION),
        config.out / "activations",
        sampling=Sampling(FIRST_CAPTION + config.seed, max(1, int(config.batch_rows))),
        num_inference_steps=config.steps,
        guidance_scale=config.guidance,
    )


def _statistics(
    config: DictionaryConfig, subject: Subject, saes: dict[str, Sae], name: str
) -> dict[str, FeatureStatistics]:
    return feature_statistics(
        subject.pipe,
        saes,
        prompt_pairs(VectorConfig(concept=name, pairs=config.pairs, seed=config.seed), subject),
        activations=config.activations,
        batch_size=max(1, int(config.batch_rows) // 2),
        num_inference_steps=config.steps,
        guidance_scale=config.guidance,
    )


def _best(
    config: DictionaryConfig,
    name: str,
    site: str,
    sae: Sae,
    read: FeatureStatistics,
    store: ActivationStore,
) -> list[FeatureFound]:
    """Select the features with the largest mean score over steps."""
    scores = read.score(config.score)
    order = torch.sort(scores.mean(0), descending=True, stable=True).indices[: config.features]
    numbers = [int(f) for f in order]
    moments = top_examples(on_rows(sae, store), store, numbers, config.moments)
    kept, rate = read.selected.mean(0), read.rate.mean(0)
    return [
        FeatureFound(
            name,
            site,
            f,
            float(scores[:, f].mean()),
            int(read.steps[scores[:, f].argmax()]),
            (float(kept[0, f]), float(kept[1, f])),
            (float(rate[0, f]), float(rate[1, f])),
            moments[f],
        )
        for f in numbers
    ]


def _scores(name: str, statistics: dict[str, FeatureStatistics]) -> pd.DataFrame:
    """Return the best feature of every method, site and step, to compare the methods."""
    rows = []
    for site, read in statistics.items():
        for method in METHODS:
            scores = read.score(method)
            best = read.top(method, 1)[:, 0]
            rows += [
                {
                    "concept": name,
                    "site": site,
                    "method": method,
                    "step": int(step),
                    "feature": int(best[place]),
                    "score": float(scores[place, best[place]]),
                }
                for place, step in enumerate(read.steps)
            ]
    return pd.DataFrame(rows)


def listen(study: DictionaryStudy, found: Sequence[FeatureFound]) -> list[list[Clip]]:
    """Clips of the moments of some features; every caption is generated once."""
    config = study.config
    subject = load(config)
    pipe = subject.pipe
    saes = dictionaries(subject, config.sites, config.dictionaries)
    texts = fresh_captions(config.prompts, FIRST_CAPTION)
    numbers = sorted({m.prompt for f in found for m in f.moments})
    clips: dict[int, tuple[Any, Any]] = {}
    for part in common.batches(numbers, max(1, int(config.batch_rows))):
        latents = subject.generate(
            subject.encode([texts[n] for n in part]),
            [FIRST_CAPTION + config.seed + n for n in part],
            **subject.call(config.steps, config.guidance),
        ).latents
        mels = pipe.codec.decode(latents)
        for n, mel, wave in zip(part, mels, pipe.codec.audio(mels), strict=True):
            clips[n] = (np.asarray(wave), mel.numpy())
    heard = []
    for one in found:
        store = ActivationStore(config.out / "activations", one.site)
        sae = on_rows(saes[one.site], store)
        heard.append(
            [
                _clip(m, texts[m.prompt], clips[m.prompt], _trace(sae, store, one.feature, m))
                for m in one.moments
            ]
        )
    return heard


def _clip(example: TopExample, text: str, sound: tuple[Any, Any], trace: list[float]) -> Clip:
    # Token 0 is the global token that the denoiser puts before the clip.
    along = trace[1:]
    place = (example.token - 0.5) / max(1, len(along)) if example.token else None
    when = "global token" if place is None else f"{place * CLIP_SECONDS:.2f} s"
    note = f"{example.value:.2f} at {when}, step {example.step}"
    return Clip(f"“{text}”", *sound, note=note, place=place, trace=along)


def _trace(sae: Sae, store: ActivationStore, feature: int, example: TopExample) -> list[float]:
    """Return the selected activation of a feature at every token of one clip and step."""
    part = ActivationStore(store.folder, store.site, steps=[example.step], prompts=[example.prompt])
    rows = torch.arange(len(part))
    with torch.no_grad():
        codes = sae.encode(part.read(rows).float(), step=example.step)
    trace = torch.zeros(len(rows))
    if codes.offsets is None:
        trace = torch.where(codes.indices == feature, codes.values, 0.0).sum(1)
    else:
        counts = codes.offsets.diff()
        of = torch.repeat_interleave(torch.arange(len(counts)), counts)
        trace.index_add_(0, of, torch.where(codes.indices == feature, codes.values, 0.0))
    order = part.labels(rows).token.argsort()
    return [float(v) for v in trace[order]]
