# SPDX-License-Identifier: Apache-2.0
"""Ops of sidechain: one public function each, one reference, and native kernels where built."""

from .. import _native
from ._library import backends
from .tap import tap_

_native.load()

__all__ = ["backends", "tap_"]
