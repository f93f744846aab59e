# SPDX-License-Identifier: Apache-2.0
"""Arithmetic of a dictionary whose weights are in half precision: at least float32."""

from __future__ import annotations

import torch
from torch import Tensor

HALVES = (torch.float16, torch.bfloat16)


def wide(tensor: Tensor) -> Tensor:
    """Return the tensor in float32 where it is in half precision, otherwise itself."""
    return tensor.float() if tensor.dtype in HALVES else tensor
