# SPDX-License-Identifier: Apache-2.0
"""One array of rows: numbered as a matrix whatever its shape and strides, never copied whole."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

#: Name of a dtype that rows may have -> the dtype they are read as.
DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float32,
}


class Part:
    """Rows of one array, numbered as if it were a matrix; bfloat16 as uint16, which NumPy has.

    An array whose rows do not lie at one distance (`x[:, 1:]` of [B, T, d]) keeps its dimensions:
    a matrix of it would be a copy, or B matrices.
    """

    def __init__(self, values: NDArray[Any], dtype: str) -> None:
        self.values, self.dtype = _flat(values), dtype
        self._rows = self.values.shape[:-1]

    def __len__(self) -> int:
        return math.prod(self._rows)

    def take(self, numbers: NDArray[np.int64]) -> NDArray[Any]:
        """Return rows [n, d] by number, a copy."""
        return self.values[np.unravel_index(numbers, self._rows)]

    def between(self, first: int, stop: int) -> NDArray[Any]:
        """Return rows [first, stop), a view where the array is a matrix."""
        if self.values.ndim == 2:
            return self.values[first:stop]
        return self.take(np.arange(first, stop))


def as_part(given: Any, what: str) -> Part:
    """Return the rows of an array [..., d], not a copy.

    Raises:
        TypeError, ValueError: see `check_rows`.
    """
    name = check_rows(given, what)
    if isinstance(given, Tensor):
        tensor = given.detach().cpu()
        return Part((tensor.view(torch.uint16) if name == "bfloat16" else tensor).numpy(), name)
    return Part(given.view(np.ndarray), name)


def check_rows(given: Any, what: str) -> str:
    """Refuse what holds no dense floating-point rows [..., d]; return the name of the dtype.

    Args:
        given: a tensor on any device, or a NumPy array.
        what: it is, for the message.

    Raises:
        TypeError: no array; one that is masked, sparse, without data, of another byte order, or of
            other numbers than float16, bfloat16 (torch), float32 and float64.
        ValueError: fewer than two dimensions.
    """
    if isinstance(given, Tensor):
        if given.layout != torch.strided or given.is_meta:
            kind = "a tensor without data" if given.is_meta else str(given.layout)
            raise TypeError(f"rows: expected a dense tensor as {what}, got {kind}")
        name = str(given.dtype).removeprefix("torch.")
    elif isinstance(given, np.ma.MaskedArray):
        raise TypeError(
            f"rows: expected an array without a mask as {what}, got a masked array [its masked "
            "numbers would be read]"
        )
    elif isinstance(given, np.ndarray):
        name = given.dtype.name
        if name in DTYPES and not given.dtype.isnative:
            raise TypeError(
                f"rows: expected numbers in the byte order of this machine as {what}, got "
                f"{given.dtype.str}"
            )
        if name == "bfloat16":
            name = "bfloat16 of NumPy, not of torch"
    else:
        raise TypeError(
            f"rows: expected tensors or arrays [..., d] as {what}, got {type(given).__name__} "
            f"{given!r}"[:200]
        )
    if name not in DTYPES:
        raise TypeError(
            f"rows: expected float16, bfloat16, float32 or float64 as {what}, got {name} [numbers "
            "of another kind are cast by whoever knows their scale]"
        )
    if given.ndim < 2:
        raise ValueError(f"rows: expected [..., d] as {what}, got shape {list(given.shape)}")
    return name


def _flat(values: NDArray[Any]) -> NDArray[Any]:
    """Return [..., d] as a matrix where its strides allow that, otherwise as it is."""
    if values.ndim == 2:
        return values
    if not values.size:
        return values.reshape(math.prod(values.shape[:-1]), values.shape[-1])
    long = [(n, s) for n, s in zip(values.shape, values.strides, strict=True)][:-1]
    long = [(n, s) for n, s in long if n > 1] or [(1, values.strides[0])]
    if any(s != n * inner for (_, s), (n, inner) in itertools.pairwise(long)):
        return values
    return np.lib.stride_tricks.as_strided(
        values,
        (math.prod(values.shape[:-1]), values.shape[-1]),
        (long[-1][1], values.strides[-1]),
        writeable=False,
    )


def checked_steps(steps: Any, count: int, name: str) -> NDArray[np.int64] | None:
    """Return the steps of `count` rows [count], or None where there are none.

    Raises:
        TypeError, ValueError: not whole numbers >= 0, or not one for each row.
    """
    if steps is None:
        return None
    found = np.asarray(steps.cpu() if isinstance(steps, Tensor) else steps)
    if found.dtype.kind not in "iu":
        raise TypeError(f"rows: expected whole steps for {name}, got {found.dtype.name}")
    if found.size != count:
        raise ValueError(f"rows: expected {count} steps [rows of {name}], got {found.size}")
    found = np.ascontiguousarray(found.reshape(-1).astype(np.int64))
    if found.size and found.min() < 0:
        raise ValueError(f"rows: expected steps >= 0 for {name}, got {found.min()}")
    return found
