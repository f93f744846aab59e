# SPDX-License-Identifier: Apache-2.0
"""Measure how well the music model obeys its prompts, read by both scorers.

Prompts are worded with seeds that training never used; a third of them has a sentence form that no
training caption had. Every cell counts clips whose most probable class is the one asked for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import mannwhitneyu
from torch import Tensor
from tqdm import tqdm

from ...io.atomic import write_text
from ...metrics.bootstrap import proportion_interval
from ..music.attributes import ATTRIBUTES, GENRES, INSTRUMENTS
from ..music.captions import describe

PROMPT_SEED = 90_001


@dataclass(frozen=True)
class Cell:
    """One row of the card: prompts that ask for `wanted` of `attribute`, and the rate to reach."""

    name: str
    attribute: str
    bar: float
    prompts: tuple[str, ...]
    wanted: tuple[str, ...]
    opposite: str | None = None  # class that at most a tenth of the clips may show


def _held_out_form(spec: Mapping[str, str], rng: np.random.Generator) -> str:
    """Word a prompt as no training caption is: noun first, then the rest in a fixed order."""
    words = describe({k: v for k, v in spec.items() if k == "instrument"}, rng, plain=True)
    noun_first = f"{words.split()[-1]}, {' '.join(words.split()[1:-1])}".rstrip(", ")
    adjectives = [spec[name] for name in ("tempo", "mood", "genre") if name in spec]
    tails = {"drums": "drums", "vocals": "vocals"}
    parts = [tails[name] for name in tails if spec.get(name) == "yes"]
    tail = f" with {' and '.join(parts)}" if parts else ""
    return f"{noun_first}{tail}, {' and '.join(adjectives)}".rstrip(", ")


def _prompt(spec: Mapping[str, str], index: int, salt: int) -> str:
    rng = np.random.default_rng([PROMPT_SEED, salt, index])
    return _held_out_form(spec, rng) if index % 3 == 2 else describe(spec, rng)


def cells(per_cell: int = 48) -> list[Cell]:
    """The rows of the card with `per_cell` prompts each, twice that for instruments and genres."""

    def build(
        name: str,
        attribute: str,
        bar: float,
        specs: list[dict[str, str]],
        wanted: list[str],
        opposite: str | None = None,
    ) -> Cell:
        salt = sum(name.encode())
        prompts = tuple(_prompt(spec, index, salt) for index, spec in enumerate(specs))
        return Cell(name, attribute, bar, prompts, tuple(wanted), opposite)

    count = range(per_cell)
    double = range(2 * per_cell)
    players = [INSTRUMENTS[i % 8] for i in double]
    styles = [GENRES[1 + (i // 8) % 4] for i in double]
    found = [
        build(
            "instrument, plain",
            "instrument",
            0.90,
            [{"instrument": name} for name in players],
            players,
        ),
        build(
            "instrument, inside genres",
            "instrument",
            0.75,
            [{"instrument": n, "genre": g} for n, g in zip(players, styles, strict=True)],
            players,
        ),
        build(
            "genre",
            "genre",
            0.85,
            [{"instrument": n, "genre": g} for n, g in zip(players, styles, strict=True)],
            styles,
        ),
    ]
    for attribute, bar in (("drums", 0.90), ("vocals", 0.85)):
        for value in ("yes", "no"):
            specs = [
                {"instrument": players[i], **({attribute: "yes"} if value == "yes" else {})}
                for i in count
            ]
            label = f"{attribute}, {'asked' if value == 'yes' else 'not asked'}"
            found.append(build(label, attribute, bar, specs, [value] * per_cell))
    for tempo, opposite in (("fast", "slow"), ("slow", "fast")):
        specs = [{"instrument": players[i], "tempo": tempo} for i in count]
        found.append(build(f"tempo, {tempo}", "tempo", 0.75, specs, [tempo] * per_cell, opposite))
    for mood in ("happy", "sad"):
        specs = [{"instrument": players[i], "mood": mood} for i in count]
        found.append(build(f"mood, {mood}", "mood", 0.75, specs, [mood] * per_cell))
    return found


def generate(pipe: Any, prompts: tuple[str, ...], seed: int, *, rows: int = 24) -> Tensor:
    """Generate latents of one clip for each prompt; clip i has the seed `seed + i` in any batch."""
    parts = []
    for start in range(0, len(prompts), rows):
        chunk = list(prompts[start : start + rows])
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(chunk))]
        parts.append(pipe(chunk, generator=generators, output_type="latent").audios)
    return torch.cat(parts)


def evaluate(
    pipe: Any,
    scorers: Mapping[str, Any],
    tagger: Any = None,
    *,
    per_cell: int = 48,
    seed: int = 777,
) -> dict[str, list[dict[str, Any]]]:
    """Measure hit rates with Wilson intervals of every cell, and the evidence of the tagger.

    Returns:
        "cells": one row for each cell with name, bar, n and per scorer `value`, `low`, `high` and
        (tempo) `opposite`; "witness" (with a tagger): one row for each concept: the AUC of its
        evidence in audio between clips that asked for it and clips of the same cells that did not.
    """
    pipe.set_progress_bar_config(disable=True)
    table = cells(per_cell)
    rows, heard = [], []
    for index, cell in enumerate(tqdm(table, desc="evaluate", unit="cell")):
        latents = generate(pipe, cell.prompts, seed + 10_000 * index)
        rows.append(_row(cell, latents, scorers))
        if tagger is not None and cell.name != "instrument, inside genres":
            audio = pipe.codec.audio(pipe.codec.decode(latents))
            heard.append((cell, tagger.hear(audio)))
    return {"cells": rows, "witness": _witness(heard)}


def _row(cell: Cell, latents: Tensor, scorers: Mapping[str, Any]) -> dict[str, Any]:
    classes = ATTRIBUTES[cell.attribute]
    row: dict[str, Any] = {"cell": cell.name, "bar": cell.bar, "n": len(cell.prompts)}
    for name, scorer in scorers.items():
        picks = scorer.probabilities(latents)[cell.attribute].argmax(1).tolist()
        hits = sum(classes[p] == w for p, w in zip(picks, cell.wanted, strict=True))
        interval = proportion_interval(hits, len(picks))
        entry = {"value": interval.value, "low": interval.low, "high": interval.high}
        if cell.opposite is not None:
            entry["opposite"] = sum(classes[p] == cell.opposite for p in picks) / len(picks)
        row[name] = {key: round(value, 4) for key, value in entry.items()}
    return row


def _witness(heard: list[tuple[Cell, Any]]) -> list[dict[str, Any]]:
    """Compute the AUC of the tagger's evidence for every concept that has tags."""
    from ..music.concepts import CONCEPTS
    from ..music.musicnn import WITNESSES

    rows = []
    for name in WITNESSES:
        wanted = CONCEPTS[name]
        inside: list[float] = []
        outside: list[float] = []
        for cell, clips in heard:
            if cell.attribute != wanted.attribute:
                continue
            for value, asked in zip(clips.evidence(name).tolist(), cell.wanted, strict=True):
                (inside if asked == wanted.positive else outside).append(value)
        if inside and outside:
            statistic = mannwhitneyu(inside, outside).statistic
            auc = float(statistic) / (len(inside) * len(outside))
            rows.append(
                {
                    "concept": name,
                    "auc": round(auc, 3),
                    "with": len(inside),
                    "without": len(outside),
                }
            )
    return rows


def write(rows: Any, path: Path) -> None:
    """Write the rows as JSON, atomically."""
    write_text(path, json.dumps(rows, indent=1) + "\n")
