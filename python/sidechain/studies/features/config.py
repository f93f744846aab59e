# SPDX-License-Identifier: Apache-2.0
"""Settings of `sidechain sae score`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..._options import choice, option, whole
from ..config import SCORES, Model, Sampling, dictionaries, folder, seed, sites
from ..localization.config import read_concepts

ACTIVATIONS = ("relu", "selected")


@dataclass(frozen=True, kw_only=True)
class DictionaryConfig(Sampling, Model):
    """Settings of `sidechain sae score`; see `sidechain sae score --help`."""

    sites: str = sites("those with a dictionary")
    dictionaries: Path | None = dictionaries()
    concepts: tuple[str, ...] = option(
        ("drums", "vocals", "violin"), "comma list, or all", read_concepts, metavar="A,B,..."
    )
    score: str = choice("tada", "what ranks features", SCORES)
    activations: str = choice(
        "relu",
        "relu: all that are positive, as published; selected: those that the dictionary selects",
        ACTIVATIONS,
        before={"open": "relu", "kept": "selected"},
    )
    features: int = whole(3, "features a concept and site", least=1)
    moments: int = whole(3, "clips a feature", least=1)
    pairs: int = whole(16, "prompt pairs a concept", least=1)
    prompts: int = whole(32, "held-out captions", least=1)
    batch_rows: int = whole(32, "clips generated at once", least=1, group="sampling")
    seed: int = seed()
    out: Path = folder("runs/sae-score")
