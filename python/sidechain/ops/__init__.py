# SPDX-License-Identifier: Apache-2.0
"""Ops of sidechain: one public function each, one reference, and native kernels where built."""

from .. import _native
from ._library import backends, register_triton
from .tap import tap_

_native.load()
register_triton()

__all__ = ["backends", "tap_"]
