# SPDX-License-Identifier: Apache-2.0
"""Concepts of the zoo's music model, and prompt pairs that differ in one concept only.

A concept is one class of one attribute. Additive concepts (drums, vocals) are in the clean prompt
and absent from the corrupted one; the others replace a word (violin by another instrument, fast by
slow).
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .attributes import ATTRIBUTES, GENRES, INSTRUMENTS
from .captions import describe

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class PromptPair:
    """Two prompts that differ in one concept; `spec` has the attributes that both mention."""

    clean: str
    corrupted: str
    spec: dict[str, str]


@dataclass(frozen=True)
class Concept:
    """A direction to look for: `attribute` is `positive` with the concept, else one of `negatives`.

    An empty `negatives` means that the corrupted prompt does not mention the attribute.
    """

    name: str
    attribute: str
    positive: str
    negatives: tuple[str, ...]

    @property
    def class_index(self) -> int:
        """Index of the positive class in a scorer's probabilities of `attribute`."""
        return ATTRIBUTES[self.attribute].index(self.positive)

    def pairs(self, count: int, seed: int = 0) -> list[PromptPair]:
        """Return `count` prompt pairs; the first ones of a seed are the same for any count.

        Raises:
            ValueError: count below 1.
        """
        if count < 1:
            raise ValueError(f"pairs: expected count >= 1, got {count}")
        return [self._pair(seed, index) for index in range(count)]

    def _pair(self, seed: int, index: int) -> PromptPair:
        import numpy as np

        rng = np.random.default_rng([seed, index, _stable_id(self.name)])
        spec = _other_attributes(rng, self.attribute)
        negative = {}
        if self.negatives:
            choices = [name for name in self.negatives if name != self.positive]
            negative = {self.attribute: choices[index % len(choices)]}
        words = int(rng.integers(2**31))
        clean = describe(
            {**spec, self.attribute: self.positive}, np.random.default_rng(words), plain=False
        )
        corrupted = describe({**spec, **negative}, np.random.default_rng(words), plain=False)
        return PromptPair(clean, corrupted, spec)


def _stable_id(name: str) -> int:
    return zlib.crc32(name.encode())  # hash() of a text changes from process to process


def _other_attributes(rng: np.random.Generator, but: str) -> dict[str, str]:
    """Draw the other attributes of a base prompt: always an instrument, the others sometimes."""
    spec = {"instrument": str(rng.choice(INSTRUMENTS))}
    rates = {"tempo": 0.6, "mood": 0.6, "drums": 0.25, "vocals": 0.15, "genre": 0.2}
    for name, rate in rates.items():
        said, pick = rng.random() < rate, rng.random()
        if not said:
            continue
        if name in ("drums", "vocals"):
            spec[name] = "yes"
        else:
            classes = [c for c in ATTRIBUTES[name] if c not in ("none", "medium")]
            spec[name] = classes[int(pick * len(classes))]
    if but in ("drums", "genre"):  # a genre brings its drums, drums lean towards a genre
        spec.pop("genre", None)
        spec.pop("drums", None)
    spec.pop(but, None)
    return spec


def _concepts() -> dict[str, Concept]:
    found = [Concept(name, "instrument", name, INSTRUMENTS) for name in INSTRUMENTS]
    found += [Concept(name, name, "yes", ()) for name in ("drums", "vocals")]
    found += [
        Concept("fast", "tempo", "fast", ("slow",)),
        Concept("slow", "tempo", "slow", ("fast",)),
        Concept("happy", "mood", "happy", ("sad",)),
        Concept("sad", "mood", "sad", ("happy",)),
    ]
    found += [Concept(name, "genre", name, GENRES[1:]) for name in GENRES[1:]]
    return {concept.name: concept for concept in found}


#: All 18 concepts by name.
CONCEPTS: dict[str, Concept] = _concepts()
#: Those that `sidechain localize` scans unless told otherwise: every attribute at least twice.
DEFAULT_CONCEPTS = (
    "piano",
    "violin",
    "flute",
    "trumpet",
    "drums",
    "vocals",
    "fast",
    "slow",
    "happy",
    "sad",
    "jazz",
    "techno",
)


def concept(name: str) -> Concept:
    """Return the concept called `name`.

    Raises:
        ValueError: no such concept; the message lists all.
    """
    if name not in CONCEPTS:
        raise ValueError(f"concept: expected one of {', '.join(CONCEPTS)}, got {name!r}")
    return CONCEPTS[name]
