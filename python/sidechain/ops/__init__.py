# SPDX-License-Identifier: Apache-2.0
"""Ops of sidechain: one public function each, one reference, and native kernels where built."""

from .. import _native
from ..reference.tap_structs import Capture, Steering
from ._library import backends, note_kernels, register_triton
from .attention_tap import attention_tap
from .encode_reduce import CodeSums, code_sums_, encode_reduce
from .encoder_structs import Encoder
from .sae_edit import sae_edit_
from .sae_structs import AdamOptions, AdamState, CodeEdit, CodeGroup, GradientInputs, SaeWeights
from .sae_update import sae_gradient_square, sae_update_
from .sparse_decode import DecodeLoss, sparse_decode, sparse_decode_loss
from .tap import tap_
from .topk_encode import Codes, topk_encode, topk_encode_fallbacks

_native.load()
note_kernels()
register_triton()

__all__ = [
    "AdamOptions",
    "AdamState",
    "Capture",
    "CodeEdit",
    "CodeGroup",
    "CodeSums",
    "Codes",
    "DecodeLoss",
    "Encoder",
    "GradientInputs",
    "SaeWeights",
    "Steering",
    "attention_tap",
    "backends",
    "code_sums_",
    "encode_reduce",
    "sae_edit_",
    "sae_gradient_square",
    "sae_update_",
    "sparse_decode",
    "sparse_decode_loss",
    "tap_",
    "topk_encode",
    "topk_encode_fallbacks",
]
