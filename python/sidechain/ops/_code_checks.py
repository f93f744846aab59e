# SPDX-License-Identifier: Apache-2.0
"""Checks of arguments of the ops on sparse codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import _checks
from ._checks import BOOL, FLOATS, INT32, INT64, SINGLE

__all__ = ["BOOL", "DOUBLE", "FLOATS", "INT32", "INT64", "SINGLE", "Checks", "first_tensor"]

DOUBLE = (torch.float64,)


@dataclass(frozen=True)
class Checks:
    """Checks of one call of `op`; all tensors belong on the device of the argument `like`.

    With `wide` everything floating is float64: the precision that only the references serve.
    """

    op: str
    device: torch.device
    wide: bool
    like: str

    def tensor(
        self,
        name: str,
        t: Any,
        dtypes: tuple[torch.dtype, ...],
        shape: tuple[int | str, ...],
        why: str,
    ) -> None:
        """Check type, dtype, device, shape and a contiguous last dim.

        A letter in `shape` stands for any size.
        """
        if self.wide and dtypes in (FLOATS, SINGLE):
            dtypes = DOUBLE
        _checks.tensor(self.op, name, t, self.device, dtypes, shape, why, like=self.like)
        if t.dim() > 0:
            _checks.last_contiguous(self.op, name, t)

    def contiguous(self, name: str, t: Tensor) -> None:
        """Check that a tensor that is written has no gaps."""
        if not t.is_contiguous():
            raise ValueError(
                f"{self.op}: expected {name} to be contiguous, got strides {list(t.stride())}"
            )

    def codes(
        self, values: Any, indices: Any, offsets: Any, *, prefix: str = "", rows: int | None = None
    ) -> int:
        """Check sparse codes, fixed width [N, K] or CSR [nnz], and return N."""
        one = "N" if rows is None else rows
        if offsets is None:
            why = "fixed width: offsets is None"
            self.tensor(f"{prefix}values", values, SINGLE, (one, "K"), why)
        else:
            self.tensor(f"{prefix}values", values, SINGLE, ("nnz",), "CSR: offsets is given")
            starts: int | str = "N + 1" if rows is None else rows + 1
            self.tensor(f"{prefix}offsets", offsets, INT64, (starts,), "row starts and the end")
            if offsets.shape[0] == 0:
                raise ValueError(f"{self.op}: expected {prefix}offsets of shape [N + 1], got [0]")
        self.tensor(f"{prefix}indices", indices, INT32, tuple(values.shape), "that of values")
        return int(values.shape[0] if offsets is None else offsets.shape[0] - 1)


def first_tensor(op: str, name: str, t: Any) -> Checks:
    """Checks of a call whose device and precision this tensor decides."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: expected {name} to be a tensor, got {type(t).__name__}")
    return Checks(op, t.device, t.dtype == torch.float64, name)
