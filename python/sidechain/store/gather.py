# SPDX-License-Identifier: Apache-2.0
"""Copying rows that lie anywhere in the shards into one block of memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]


def gather_rows(
    shards: Sequence[Bytes], shard: NDArray[np.int64], row: NDArray[np.int64], out: Bytes
) -> None:
    """out[i] = shards[shard[i]][row[i]].

    Args:
        shards: [n_s, row_bytes] uint8 each.
        shard: number of the shard of every row [B].
        row: number of the row within its shard [B].
        out: [B, row_bytes] uint8, written.
    """
    used = np.unique(shard)
    if len(used) == 1:
        np.take(shards[int(used[0])], row, axis=0, out=out, mode="clip")
        return
    for number in used:
        places = np.flatnonzero(shard == number)
        out[places] = shards[int(number)][row[places]]
