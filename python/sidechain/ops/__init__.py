# SPDX-License-Identifier: Apache-2.0
"""Ops of sidechain: one public function each, one reference, and native kernels where built."""

from .. import _native
from ._library import backends, register_triton
from .tap import tap_
from .topk_encode import Codes, topk_encode, topk_encode_fallbacks

_native.load()
register_triton()

__all__ = ["Codes", "backends", "tap_", "topk_encode", "topk_encode_fallbacks"]
