# SPDX-License-Identifier: Apache-2.0
"""Settings of `sidechain vector`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ... import _values as values
from ..._errors import InputError
from ..._options import flag, option, path, text, whole
from ..config import METHODS, Method, Model, Sampling, seed, sites

__all__ = ["METHODS", "VectorConfig"]

Sides = tuple[Sequence[str], Sequence[str]]


def read_sides(name: str, value: Any) -> Sides | None:
    """Read a CSV with columns positive,negative: both columns."""
    if value is None:
        return None
    if isinstance(value, list | tuple):
        if len(value) != 2:
            raise InputError(f"{name}: expected two lists of prompts, got {len(value)}")
        return tuple(map(str, value[0])), tuple(map(str, value[1]))
    from ...metrics.tables import read_table

    rows = read_table(value, text=("positive", "negative"), name=name)
    return tuple(str(row["positive"]) for row in rows), tuple(str(row["negative"]) for row in rows)


@dataclass(frozen=True, kw_only=True)
class VectorConfig(Method, Sampling, Model):
    """Settings of `sidechain vector`; see `sidechain vector --help`.

    Without `out` the vector is not saved.
    """

    concept: str | None = text(
        None, "a concept of the model's data; with --prompts any name", "NAME"
    )
    prompts: Sides | None = option(
        None, "own prompts instead, columns positive,negative", read_sides, metavar="FILE.csv"
    )
    pairs: int = whole(50, "prompt pairs", least=1)
    sites: str = sites("sites to record")
    seed: int = seed()
    normalise: bool = flag(
        "scale every direction to length 1; otherwise strength 1 is one natural difference",
        flag="--unit",
    )
    out: Path | None = path(
        None,
        "default runs/vectors/CONCEPT.safetensors",
        "FILE",
        values.file_to_write(".safetensors"),
        replayed=False,
    )
