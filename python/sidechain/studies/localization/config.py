# SPDX-License-Identifier: Apache-2.0
"""Settings of `sidechain localize`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ... import _values as values
from ..._errors import InputError
from ..._options import choice, flag, number, option, whole
from ...metrics.thresholds import TAU
from ...zoo.music.concepts import CONCEPTS, DEFAULT_CONCEPTS
from ..config import MODEL, Model, Sampling, Scoring, folder, sites

#: concept -> (clean, corrupted) or (clean, corrupted, text that scorers compare with)
Pairs = Mapping[str, Sequence[tuple[str, ...]]]
_COLUMNS = ("concept", "clean_prompt", "corrupted_prompt")


def read_concepts(name: str, value: Any) -> tuple[str, ...]:
    """Read a comma list of concepts of the zoo, or "all"."""
    return tuple(CONCEPTS) if value == "all" else values.words(CONCEPTS)(name, value)


def read_names(name: str, value: Any) -> tuple[str, ...]:
    """Read a comma list of concepts of any name, or "all" for those of the zoo."""
    if value == "all":
        return tuple(CONCEPTS)
    found = [w.strip() for w in value.split(",")] if isinstance(value, str) else value
    if not isinstance(found, list | tuple):
        raise InputError(f"{name}: expected a list, got {value!r}")
    if not found or not all(found):
        raise InputError(f"{name}: expected names of concepts, got {value!r}")
    return tuple(dict.fromkeys(map(str, found)))


def read_pairs(name: str, value: Any) -> Pairs | None:
    """Read prompt pairs by concept: a CSV, columns concept,clean_prompt,corrupted_prompt[,text]."""
    if value is None:
        return None
    if isinstance(value, Mapping):
        return {
            str(concept): [tuple(str(text) for text in pair) for pair in pairs]
            for concept, pairs in value.items()
        }
    from ...metrics.tables import read_table

    found: dict[str, list[tuple[str, ...]]] = {}
    for row in read_table(value, text=_COLUMNS, optional=("text",), name=name):
        pair = (str(row["clean_prompt"]), str(row["corrupted_prompt"]))
        text = str(row["text"])
        found.setdefault(str(row["concept"]), []).append((*pair, text) if text else pair)
    return found


@dataclass(frozen=True, kw_only=True)
class LocalizationConfig(Scoring, Sampling, Model):
    """Settings of `sidechain localize`; see `sidechain localize --help`."""

    concepts: tuple[str, ...] = option(
        DEFAULT_CONCEPTS,
        "comma list, or all (default: those of --prompts, or else twelve of them)",
        read_names,
        metavar="A,B,...",
    )
    prompts: Pairs | None = option(
        None,
        "own prompt pairs of any concepts, columns concept,clean_prompt,corrupted_prompt and, if "
        "scorers shall not compare with the concept's name, text",
        read_pairs,
        metavar="FILE.csv",
    )
    sites: str = sites("sites to scan")
    how: str = choice("context", "what is swapped at a site", ("context", "key", "value"))
    windows: int = whole(1, "also scan windows of N consecutive sites", least=1)
    pairs: int = whole(16, "prompt pairs per concept", least=1)
    seeds: tuple[int, ...] = option(
        (0,), "repeat for these seeds", values.seeds, metavar="N", many="+"
    )
    tau: float = number(TAU, "threshold of the mean impact", least=0.0)
    audio: bool = flag("also write clips of the first prompt pair to listen to")
    out: Path = folder("runs/localize")

    def check_prompts(self) -> None:
        """Check that there are pairs for every concept, and a scorer that knows it.

        Raises:
            InputError: there are none for one of them, or the zoo does not have it.
        """
        if self.prompts is not None:
            missing = [c for c in self.concepts if c not in self.prompts]
            if missing:
                raise InputError(
                    "--prompts: expected pairs for every concept of --concepts, got none for "
                    f"{missing[0]}"
                )
        own = self.model == MODEL and (not self.scorer or "zoo" in self.scorer)
        unknown = [c for c in self.concepts if c not in CONCEPTS]
        if unknown and (self.prompts is None or own):
            option = "--concepts" if self.prompts is None else "--prompts, column concept"
            raise InputError(f"{option}: expected {' | '.join(CONCEPTS)}, got {unknown[0]!r}")
