# SPDX-License-Identifier: Apache-2.0
"""Reuse of freed memory by the C library."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # parameters of mallopt, malloc.h
_KEPT = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let glibc keep freed blocks instead of returning every large one to the system.

    Tensors above 32 MB are mapped anew, page by page, each time they are made, which costs a batch
    of 64 clips of the zoo's model a quarter of its time on a CPU. The process keeps its peak memory
    until it ends. The setting is global, so only the command line and the benches make it.

    Returns:
        Whether the C library accepted it (glibc only).
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _KEPT)) and bool(mallopt(_TRIM_THRESHOLD, _KEPT))
