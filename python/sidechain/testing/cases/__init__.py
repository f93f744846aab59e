# SPDX-License-Identifier: Apache-2.0
"""Case tables shared by tests and benches, one module per op.

Shapes met in diffusion models beside ugly ones.
"""

import torch

from .tap import TAP_BENCH, TAP_CASES, TapCase
from .topk_encode import TOPK_ENCODE_BENCH, TOPK_ENCODE_CASES, TopkEncodeCase

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}

__all__ = [
    "DTYPES",
    "TAP_BENCH",
    "TAP_CASES",
    "TOPK_ENCODE_BENCH",
    "TOPK_ENCODE_CASES",
    "TapCase",
    "TopkEncodeCase",
]
