# SPDX-License-Identifier: Apache-2.0
from typing import Any

import numpy as np
from numpy.typing import NDArray

def build_info() -> dict[str, str]: ...
def isas() -> list[str]: ...
def best_isa() -> str: ...
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
    ring_stride: int = 1,
    capture_mask: NDArray[np.bool_] | None = None,
) -> None: ...
