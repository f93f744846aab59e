# SPDX-License-Identifier: Apache-2.0
"""Labels of rows: as read from a store, and on their way to disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from .manifest import COLUMNS, Columns
from .statistics import Cell

Label = int | NDArray[Any]


@dataclass(frozen=True)
class Labels:
    """What is known about rows; each [n].

    Attributes:
        step: scheduler step, int64.
        branch: number of the CFG pass in `ActivationStore.branches`, int64.
        prompt: number of the prompt, int64, -1 where not known.
        token: number within the sample, int64.
    """

    step: Tensor
    branch: Tensor
    prompt: Tensor
    token: Tensor


@dataclass(frozen=True, slots=True)
class BroadcastLabels:
    """What is known about `count` rows; each a number for all of them or [count]."""

    count: int
    step: Label
    branch: Label
    prompt: Label
    token: Label

    def cells(self) -> Iterator[tuple[int, int, Cell]]:
        """Runs of rows of one (step, branch): first row, end, which."""
        if isinstance(self.step, int) and isinstance(self.branch, int):
            yield 0, self.count, (self.step, self.branch)
            return
        both = np.broadcast_to(
            np.multiply(self.step, 256, dtype=np.int64) + self.branch, self.count
        )
        edges = (np.flatnonzero(np.diff(both)) + 1).tolist()
        for start, stop in zip([0, *edges], [*edges, self.count], strict=True):
            yield start, stop, divmod(int(both[start]), 256)


def read_labels(
    count: int, step: ArrayLike, branch: ArrayLike, prompt: ArrayLike, token: ArrayLike | None
) -> BroadcastLabels:
    """Check labels against the number of rows and the range of their columns.

    Raises:
        TypeError: not integers.
        ValueError: another shape, or out of range.
    """
    return BroadcastLabels(
        count,
        _read("step", step, count),
        _read("branch", branch, count),
        _read("prompt", prompt, count),
        np.arange(count, dtype=COLUMNS["token"]) if token is None else _read("token", token, count),
    )


_LIMITS = {name: (np.iinfo(dtype).min, np.iinfo(dtype).max) for name, dtype in COLUMNS.items()}


def _read(name: str, value: ArrayLike, count: int) -> Label:
    low, high = _LIMITS[name]
    if type(value) is int and low <= value <= high:
        return value
    array = np.asarray(value)
    if array.dtype.kind not in "iu":
        raise TypeError(f"store: expected integers in {name}, got {array.dtype}")
    if array.shape not in ((), (count,)):
        raise ValueError(
            f"store: expected {name} as a number or of shape [{count}] [rows], got "
            f"{list(array.shape)}"
        )
    if array.size and (array.min() < low or array.max() > high):
        raise ValueError(
            f"store: expected {name} within [{low}, {high}], got {array.min()} to {array.max()}"
        )
    return array.astype(COLUMNS[name]) if array.shape else int(array)


def join_columns(labels: Sequence[BroadcastLabels]) -> Columns:
    """Columns of a shard, one entry for each row."""
    return {
        name: np.concatenate([_expand(getattr(part, name), part.count, d) for part in labels])
        for name, d in COLUMNS.items()
    }


def _expand(label: Label, count: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    return np.full(count, label, dtype) if isinstance(label, int) else label
