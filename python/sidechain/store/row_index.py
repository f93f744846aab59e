# SPDX-License-Identifier: Apache-2.0
"""The row index: which row of which shard a row of the store is, and copying rows by it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .. import _native

Numbers = NDArray[np.int64]
Bytes = NDArray[np.uint8]


class RowIndex:
    """The rows of several shards that are kept, numbered one after the other.

    Args:
        keep: for each shard a mask [n_s] bool of its rows.

    Neighbouring rows that are kept form spans, so the index is as long as there are gaps.

    Attributes:
        shard: [R] shard of every span.
        row: [R] row of that shard with which the span begins.
        ends: [R] number, in the whole, of the row after its last one.
    """

    def __init__(self, keep: Sequence[NDArray[np.bool_]]) -> None:
        shards, firsts, counts = [], [], []
        for number, mask in enumerate(keep):
            edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.view(np.int8), [0]])))
            firsts.append(edges[::2])
            counts.append(edges[1::2] - edges[::2])
            shards.append(np.full(len(edges) // 2, number))
        empty = np.zeros(0, np.int64)
        self.shard: Numbers = np.concatenate([empty, *shards]).astype(np.int64)
        self.row: Numbers = np.concatenate([empty, *firsts]).astype(np.int64)
        lengths = np.concatenate([empty, *counts]).astype(np.int64)
        self.ends: Numbers = np.cumsum(lengths)
        # Row of the shard less number of the row, constant along a span.
        self._shift = self.row - (self.ends - lengths)

    def __len__(self) -> int:
        """Rows of all spans."""
        return int(self.ends[-1]) if len(self.ends) else 0

    def locate(self, rows: Numbers) -> tuple[Numbers, Numbers]:
        """Return shard and row within it of rows [B] by number.

        Raises:
            IndexError: a number outside [0, len).
        """
        if rows.size and not 0 <= rows.min() <= rows.max() < len(self):
            raise IndexError(
                f"locate: expected rows within [0, {len(self)}), got {rows.min()} to {rows.max()}"
            )
        span = np.searchsorted(self.ends, rows, side="right")
        return self.shard[span], rows + self._shift[span]


def gather_rows(
    shards: Sequence[Bytes], shard: NDArray[np.int64], row: NDArray[np.int64], out: Bytes
) -> None:
    """out[i] = shards[shard[i]][row[i]].

    The native form fetches the next rows while it copies one; without it NumPy does the same,
    shard by shard. Both let other threads run.

    Args:
        shards: [n_s, row_bytes] uint8 each, contiguous.
        shard: number of the shard of every row [B].
        row: number of the row within its shard [B].
        out: [B, row_bytes] uint8, contiguous, written.

    Raises:
        IndexError: a row that does not exist.
    """
    native = getattr(_native.host(), "gather_rows", None)
    if native is not None:
        native(list(shards), shard, row, out)
        return
    for number in np.unique(shard):
        places = np.flatnonzero(shard == number)
        out[places] = shards[int(number)][row[places]]
