# SPDX-License-Identifier: Apache-2.0
"""Options of a store: how rows are stored, and how they are read in batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .finite import POLICIES
from .manifest import DTYPES

SHUFFLES = ("rows", "blocks", "off")
NORMALISATIONS = ("step", "global")


@dataclass(frozen=True)
class Storage:
    """How rows are stored.

    Attributes:
        dtype: float32 | float16 | bfloat16 | int8 (one float32 scale for each row).
        shard_bytes: a shard is closed by the transaction that fills it.
        queue_bytes: rows that may wait in memory; writing waits when they are reached.
        commit_seconds: longest time between commits while rows come in.

    Raises:
        TypeError, ValueError: another dtype, or sizes below 1.
    """

    dtype: torch.dtype = torch.float16
    shard_bytes: int = 256 << 20
    queue_bytes: int = 256 << 20
    commit_seconds: float = 60.0

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES.values():
            raise TypeError(
                f"store: expected dtype float32 | float16 | bfloat16 | int8, got {self.dtype!r}"
            )
        for name in ("shard_bytes", "queue_bytes"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"store: expected {name} >= 1, got {value!r}")


@dataclass(frozen=True)
class BatchOptions:
    """Which batches of a store, and in which order.

    Attributes:
        batch_size: B.
        seed: of the order, which is a function of the seed and the number of the epoch.
        shuffle: "rows" visits single rows in a pseudo-random permutation of all of them; "blocks"
            permutes blocks of 64 neighbouring rows and then the rows within every 64 x B of them
            (less random, for disks that are slow at random reads); "off" reads in the order of
            writing.
        epochs: how many times through the rows; None = without end.
        normalise: "step" gives (x - mean[step]) / scale[step], "global" one mean and scale, both
            from the statistics of the store and float32; None leaves rows as they are.
        dtype: of the rows. None = as stored (float32 for int8 and when normalised).
        labels: whether batches carry labels.
        drop_last: leave out the last rows of an epoch that do not fill a batch.
        prefetch: batches prepared ahead by a thread; 0 = none and no thread.
        on_bad_rows: None gives rows as they are; "error" raises at a row that is not finite, or
            whose square is not; "skip" reads another row in its place, drawn by the seed, and
            counts it in `Batch.skipped`.

    Raises:
        TypeError, ValueError: a value that none of them may have.
    """

    batch_size: int
    seed: int = 0
    shuffle: str = "rows"
    epochs: int | None = 1
    normalise: str | None = None
    dtype: torch.dtype | None = None
    labels: bool = False
    drop_last: bool = True
    prefetch: int = 2
    on_bad_rows: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.batch_size, bool) or not isinstance(self.batch_size, int):
            raise TypeError(f"batches: expected batch_size as int, got {self.batch_size!r}")
        _one_of("shuffle", self.shuffle, SHUFFLES)
        if self.normalise is not None:
            _one_of("normalise", self.normalise, NORMALISATIONS, ", or None")
        if self.on_bad_rows is not None:
            _one_of("on_bad_rows", self.on_bad_rows, POLICIES, ", or None")


def _one_of(name: str, value: Any, known: tuple[str, ...], none: str = "") -> None:
    if value not in known:
        raise ValueError(
            f"batches: expected {name} to be one of {', '.join(known)}{none}, got {value!r}"
        )
