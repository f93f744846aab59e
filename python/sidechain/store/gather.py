# SPDX-License-Identifier: Apache-2.0
"""Copying rows that lie anywhere in the shards into one block of memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .. import _native

Bytes = NDArray[np.uint8]


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
