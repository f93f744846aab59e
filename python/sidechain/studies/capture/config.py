# SPDX-License-Identifier: Apache-2.0
"""Settings of `sidechain capture`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ... import _values as values
from ..._options import choice, option, whole
from ..config import DTYPES, Model, Sampling, folder, seed, sites

STORED = ("float32", "float16", "bfloat16", "int8")


@dataclass(frozen=True, kw_only=True)
class CaptureConfig(Sampling, Model):
    """Settings of `sidechain capture`; see `sidechain capture --help`.

    `dtype` is that of the rows on disk, `model_dtype` that of the model.
    """

    prompts: int | tuple[str, ...] = option(
        100,
        "number of made-up captions, or a text file with one prompt per line",
        values.prompts,
        metavar="N|FILE",
    )
    sites: str = sites("sites to record")
    branches: str = choice(
        "cond", "guidance branches to record", ("cond", "uncond", "all"), was="passes"
    )
    window: tuple[int | float, int | float] | None = option(
        None,
        "steps A to B - 1, or fractions of the run such as 0.25:0.75 (default: all)",
        values.window,
        metavar="A:B",
    )
    every: int = whole(1, "record one step in N", least=1)
    tokens: slice | None = option(
        None, "a slice of the tokens (default: all)", values.span, metavar="A:B[:STEP]"
    )
    dtype: str = choice("float16", "of the rows on disk; int8 has a scale for each row", STORED)
    model_dtype: str = choice("float32", "of the model's weights", DTYPES, group="model")
    queue_bytes: int = option(
        256 << 20,
        "rows waiting in memory, in MiB (default 256)",
        values.mebibytes,
        flag="--queue-mb",
        metavar="N",
    )
    shard_bytes: int = option(
        256 << 20,
        "size of a shard in MiB (default 256)",
        values.mebibytes,
        flag="--shard-mb",
        metavar="N",
    )
    seed: int = seed()
    out: Path = folder("runs/capture")
