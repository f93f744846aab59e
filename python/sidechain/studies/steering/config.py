# SPDX-License-Identifier: Apache-2.0
"""Settings of `sidechain steer`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ... import _values as values
from ..._options import choice, flag, option, path, text
from ...zoo.music.concepts import CONCEPTS
from ..config import Method, Model, Sampling, Scoring, folder, seed

ARMS = ("localized", "all", "ablated", "random")
#: The modes of `sidechain.taps.steer`.
BRANCH_MODES = (
    "cond_only",
    "uncond_only",
    "both_cond",
    "both_uncond",
    "separate",
    "uncond_for_cond",
)


def _arms(name: str, value: Any) -> tuple[str, ...]:
    return values.words(ARMS)(name, value)


@dataclass(frozen=True, kw_only=True)
class SteeringConfig(Method, Scoring, Sampling, Model):
    """Settings of `sidechain steer`; see `sidechain steer --help`."""

    vector: Path | None = path(None, "a vector of `sidechain vector`", "FILE", values.file_there)
    concept: str | None = text(None, "make the vector of this concept first", "NAME")
    scored_as: str | None = choice(
        None,
        "class of the classifiers that a vector of one's own is scored as, which also names its "
        "held-out prompts and localized sites (default: the concept of the vector)",
        tuple(CONCEPTS),
        metavar="NAME",
    )
    scored_text: str | None = text(
        None,
        "text that clap, clip or a function compares with (default: the name of the concept)",
        "TEXT",
        group="scoring",
    )
    distance: str = option(
        "scorer",
        "how far a sample is from the one of strength 0: scorer (its feature maps), spectral, "
        "lpips, clap:FOLDER|ID or clip:FOLDER|ID",
        values.distance,
        metavar="DISTANCE",
        checked=True,
        group="scoring",
    )
    strengths: tuple[float, ...] = option(
        (0.0, 1.0, 2.0, 4.0, 8.0),
        "a,b,c or lo:hi:n; 0 is always included",
        values.strengths,
        metavar="LIST",
    )
    sites: str | None = text(
        None,
        "the localized sites (default: the best ones of the shipped localization)",
        "GLOB",
    )
    prompts: int | tuple[str, ...] = option(
        16,
        "number of held-out prompts, or a text file with one per line",
        values.prompts,
        metavar="N|FILE",
    )
    arms: tuple[str, ...] = option(ARMS, "which arms to compare", _arms, metavar="LIST")
    branches: str = choice("cond_only", "guidance branches to steer", BRANCH_MODES, was="passes")
    renorm: bool = flag("keep the length of every steered token")
    audio: bool = flag("also write clips to listen to")
    seed: int = seed()
    out: Path = folder("runs/steer")
