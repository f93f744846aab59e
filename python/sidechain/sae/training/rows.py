# SPDX-License-Identifier: Apache-2.0
"""`Rows`: what a step trains on, and how items of any shape become rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...store.array_part import check_rows


class Rows(NamedTuple):
    """Rows of a batch.

    Attributes:
        x: [N, d_in], any float dtype.
        step: scheduler step of each row [N] int64, or None.
        target: [N, d_out] of a transcoder, or None.
    """

    x: Tensor
    step: Tensor | None = None
    target: Tensor | None = None


Item = Any
"""A tensor or array [..., d], a pair (x, step), `Rows`, or a mapping with their names."""


def as_rows(item: Item, number: int = 0) -> Rows:
    """Return rows [n, d] of a tensor or array [..., d], of (x, step) or of `Rows`.

    A list of one tensor, as a loader of a `TensorDataset` gives it, is that tensor; a list of more
    is refused: nothing says whether its second is a step, a class or a target.

    Args:
        item: what a stream yields.
        number: of the item, for messages.

    Raises:
        TypeError: something else.
        ValueError: steps or targets that do not fit the rows.
    """
    parts = _parts(item, number)
    x = _matrix(parts[0], f"item {number}")
    step, target = parts[1], parts[2]
    if step is not None:
        step = _steps(step, len(x), number)
    if target is not None:
        target = _matrix(target, f"the target of item {number}")
        if len(target) != len(x):
            raise ValueError(
                f"rows: expected {len(x)} target rows [rows of x] in item {number}, got "
                f"{len(target)}"
            )
    return Rows(x, step, target)


def _parts(item: Item, number: int) -> tuple[Any, Any, Any]:
    if isinstance(item, Mapping):
        if len(item) == 1:
            return next(iter(item.values())), None, None
        if "x" not in item or not item.keys() <= set(Rows._fields):
            raise TypeError(
                f"rows: expected the names {', '.join(Rows._fields)} in item {number}, got "
                f"{', '.join(map(str, item))}"
            )
        return item["x"], item.get("step"), item.get("target")
    if isinstance(item, list) and len(item) == 1:
        return item[0], None, None
    if isinstance(item, tuple) and 1 <= len(item) <= 3:
        return (*item, None, None)[:3]
    if isinstance(item, list | tuple):
        raise TypeError(
            f"rows: expected a tensor, a tuple (x, step) or Rows as item {number}, got a "
            f"{type(item).__name__} of {len(item)} [say what they are: map it to Rows(x, step)]"
        )
    return item, None, None


def _matrix(x: Any, what: str) -> Tensor:
    check_rows(x, what)
    if isinstance(x, np.ndarray):
        x = torch.from_numpy(x if x.flags.writeable else x.copy())
    if not x.shape[-1]:
        raise ValueError(f"rows: expected [..., d] as {what}, got shape {list(x.shape)}")
    found: Tensor = x.reshape(-1, x.shape[-1])
    return found


def _steps(step: Any, count: int, number: int) -> Tensor:
    found = torch.as_tensor(step)
    if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        raise TypeError(f"rows: expected whole steps in item {number}, got {found.dtype}")
    found = found.expand(count) if found.dim() == 0 else found.reshape(-1)
    if len(found) != count:
        raise ValueError(
            f"rows: expected {count} steps [rows of x] in item {number}, got {len(found)}"
        )
    return found.long()


def selected(rows: Rows, chosen: Any) -> Rows:
    """Return rows by a slice, a mask or numbers."""
    return Rows(*(None if t is None else t[chosen] for t in rows))  # type: ignore[arg-type]


def join(held: Sequence[Rows]) -> Rows:
    """Return the rows of several one after the other; all have steps and targets, or none has."""
    if len(held) == 1:
        return held[0]
    columns = zip(*held, strict=True)
    return Rows(*(None if c[0] is None else torch.cat(c) for c in columns))  # type: ignore[arg-type]
