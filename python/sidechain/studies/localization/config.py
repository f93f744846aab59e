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
from ..config import Model, Sampling, folder, sites

Pairs = Mapping[str, Sequence[tuple[str, str]]]


def read_concepts(name: str, value: Any) -> tuple[str, ...]:
    """Read a comma list of concepts, or "all"."""
    return tuple(CONCEPTS) if value == "all" else values.words(CONCEPTS)(name, value)


def read_pairs(name: str, value: Any) -> Pairs | None:
    """Read a CSV with columns concept,clean_prompt,corrupted_prompt: pairs by concept."""
    if value is None:
        return None
    known = values.words(CONCEPTS)
    if isinstance(value, Mapping):
        return {
            concept: [(str(clean), str(corrupted)) for clean, corrupted in pairs]
            for concept, pairs in value.items()
        }
    from ...metrics.tables import read_table

    found: dict[str, list[tuple[str, str]]] = {}
    columns = ("concept", "clean_prompt", "corrupted_prompt")
    for row in read_table(value, text=columns, name=name):
        (concept,) = known(f"{name}, column concept", [str(row["concept"])])
        found.setdefault(concept, []).append(
            (str(row["clean_prompt"]), str(row["corrupted_prompt"]))
        )
    return found


@dataclass(frozen=True, kw_only=True)
class LocalizationConfig(Sampling, Model):
    """Settings of `sidechain localize`; see `sidechain localize --help`."""

    concepts: tuple[str, ...] = option(
        DEFAULT_CONCEPTS,
        "comma list, or all (default: those of --prompts, or else twelve of them)",
        read_concepts,
        metavar="A,B,...",
    )
    prompts: Pairs | None = option(
        None,
        "own prompt pairs, columns concept,clean_prompt,corrupted_prompt",
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
        """Check that there are pairs for every concept.

        Raises:
            InputError: there are none for one of them.
        """
        missing = (
            [] if self.prompts is None else [c for c in self.concepts if c not in self.prompts]
        )
        if missing:
            raise InputError(
                "--prompts: expected pairs for every concept of --concepts, got none for "
                f"{missing[0]}"
            )
