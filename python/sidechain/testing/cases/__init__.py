# SPDX-License-Identifier: Apache-2.0
"""Case tables shared by tests and benches, one module per op.

Shapes of diffusion models, and irregular ones.
"""

import torch

from ._capture import structured
from .attention_tap import ATTENTION_BENCH, ATTENTION_CASES, AttentionCase
from .encode_reduce import SUMS_BENCH, SUMS_CASES, SumsCase
from .sae_edit import EDIT_BENCH, EDIT_CASES, EditCase, edit_call
from .sae_update import UPDATE_BENCH, UPDATE_CASES, UpdateCase, square_args, update_call
from .sparse_decode import DECODE_BENCH, DECODE_CASES, DecodeCase
from .tap import TAP_BENCH, TAP_CASES, TAP_LIMITS, TapCase
from .topk_encode import TOPK_ENCODE_BENCH, TOPK_ENCODE_CASES, TopkEncodeCase, encode_case

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}

__all__ = [
    "ATTENTION_BENCH",
    "ATTENTION_CASES",
    "DECODE_BENCH",
    "DECODE_CASES",
    "DTYPES",
    "EDIT_BENCH",
    "EDIT_CASES",
    "SUMS_BENCH",
    "SUMS_CASES",
    "TAP_BENCH",
    "TAP_CASES",
    "TAP_LIMITS",
    "TOPK_ENCODE_BENCH",
    "TOPK_ENCODE_CASES",
    "UPDATE_BENCH",
    "UPDATE_CASES",
    "AttentionCase",
    "DecodeCase",
    "EditCase",
    "SumsCase",
    "TapCase",
    "TopkEncodeCase",
    "UpdateCase",
    "edit_call",
    "encode_case",
    "square_args",
    "structured",
    "update_call",
]
