# SPDX-License-Identifier: Apache-2.0
"""What `Batches` needs of a store: rows by number, with their labels and statistics."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from numpy.typing import NDArray

from .labels import Labels
from .statistics import Statistics


class RowReader(Protocol):
    """Rows of one width that are read by number; `ActivationStore` is the one on disk.

    Attributes:
        width: elements of a row.
        dtype: as stored; rows of int8 carry their scale.
    """

    width: int
    dtype: torch.dtype

    def __len__(self) -> int:
        """Rows that are kept."""

    @property
    def statistics(self) -> Statistics:
        """Statistics of the rows."""

    @property
    def row_bytes(self) -> int:
        """Bytes of a stored row."""

    @property
    def fingerprint(self) -> int:
        """A number that changes with the rows."""

    def gather(self, rows: NDArray[Any], out: NDArray[Any]) -> None:
        """Copy stored rows [n, row_bytes] by number."""

    def labels(self, rows: NDArray[Any]) -> Labels:
        """Labels of rows by number."""
