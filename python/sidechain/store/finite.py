# SPDX-License-Identifier: Apache-2.0
"""Rows that cannot be trained on: not finite, or so large that their square is not."""

from __future__ import annotations

import torch
from torch import Tensor

#: What to do with bad rows.
POLICIES = ("error", "skip")

#: Norm above which a square is not finite in float32.
LARGEST = float(torch.finfo(torch.float32).max) ** 0.5


def bad_rows(x: Tensor) -> Tensor:
    """Return the numbers of the bad rows of x [n, C] of any float dtype, int64 where x is.

    A row is bad if |x|^2 is not finite in float32: it holds NaN or infinity, or its square
    overflows, which would make the loss and then every weight infinite.
    """
    norms = torch.linalg.vector_norm(x.detach().float(), dim=-1)
    return (~norms.isfinite()).nonzero()[:, 0]
