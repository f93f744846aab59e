# SPDX-License-Identifier: Apache-2.0
from typing import Any

import numpy as np
from numpy.typing import NDArray

def build_info() -> dict[str, str]: ...
def isas() -> list[str]: ...
def best_isa() -> str: ...
def attention_tap(
    q: NDArray[Any],
    k_bank: NDArray[Any],
    v_bank: NDArray[Any],
    *,
    dtype: str = "float32",
    isa: str,
    context_index: NDArray[np.int32] | None = None,
    context_mask: NDArray[np.bool_] | None = None,
    scale: float,
    sums: NDArray[np.float32] | None = None,
    squares: NDArray[np.float32] | None = None,
    counts: NDArray[np.float32] | None = None,
    capture_mask: NDArray[np.bool_] | None = None,
) -> NDArray[Any]: ...
def gather_rows(
    shards: list[NDArray[np.uint8]],
    shard: NDArray[np.int64],
    row: NDArray[np.int64],
    out: NDArray[np.uint8],
) -> None: ...
def tap(
    x: NDArray[Any],
    *,
    dtype: str = "float32",
    isa: str,
    vector: NDArray[np.float32] | None = None,
    strength: NDArray[np.float32] | None = None,
    removal: NDArray[np.float32] | None = None,
    steer_mask: NDArray[np.bool_] | None = None,
    renorm: bool = False,
    sums: NDArray[np.float32] | None = None,
    squares: NDArray[np.float32] | None = None,
    counts: NDArray[np.float32] | None = None,
    ring: NDArray[Any] | None = None,
    ring_dtype: str = "float32",
    capture_mask: NDArray[np.bool_] | None = None,
) -> None: ...
def topk_encode(
    x: NDArray[np.float32],
    w: NDArray[np.float32],
    *,
    isa: str,
    b_enc: NDArray[np.float32] | None = None,
    b_pre: NDArray[np.float32] | None = None,
    k: int = 0,
    batch: bool = False,
    threshold: NDArray[np.float32] | None = None,
    precision: int = 0,
) -> tuple[NDArray[np.float32], NDArray[np.int32], NDArray[np.int64] | None, int]: ...
