# SPDX-License-Identifier: Apache-2.0
"""Find Triton and the launchers of `triton_kernels`, and remember why Triton is absent.

Triton is imported by the first call that needs it: importing this package stays cheap.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch

OLDEST = (3, 6)


def interpreting() -> bool:
    """Whether Triton runs kernels on CPU tensors (``TRITON_INTERPRET=1``, for tests)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def installed() -> bool:
    """Return whether Triton can be imported, without importing it."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def absent() -> str | None:
    """Return None when Triton kernels can run here, else the reason they cannot."""
    if not installed():
        return "triton is not installed: pip install 'sidechain[triton]'"
    try:
        version = importlib.import_module("triton").__version__
    except ImportError as error:
        return f"cannot import triton: {str(error).splitlines()[0]}"
    if tuple(int(n) for n in version.split(".")[:2]) < OLDEST:
        return f"triton {version} is too old: expected {'.'.join(map(str, OLDEST))} or newer"
    if not interpreting() and not torch.cuda.is_available():
        return "no CUDA device"
    return None


@functools.cache
def launcher(op: str) -> Callable[..., Any]:
    """Return the function that launches an op: `sidechain.triton_kernels.<stem>.launch_<stem>`."""
    stem = op.rstrip("_")
    module = importlib.import_module(f"sidechain.triton_kernels.{stem}")
    found: Callable[..., Any] = getattr(module, f"launch_{stem}")
    return found
