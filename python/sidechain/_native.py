# SPDX-License-Identifier: Apache-2.0
"""Find and load the native libraries, and remember why one is absent.

``_C`` holds the CPU kernels, ``_C_cuda`` the CUDA kernels (loaded only beside a CUDA build of
torch), ``_host`` is a pybind11 module without tensors: build facts and per-ISA test entries.
"""

from __future__ import annotations

import importlib
import os
import warnings
from pathlib import Path
from types import ModuleType

import torch

LIBRARIES = ("_C", "_C_cuda", "_host")
_ISAS = ("baseline", "avx2", "avx512")
_folder = Path(__file__).resolve().parent
_absent: dict[str, str | None] = {}


def enabled() -> bool:
    """Return whether native code may be used: ``SIDECHAIN_NATIVE=0`` turns all of it off."""
    return os.environ.get("SIDECHAIN_NATIVE", "1") != "0"


def absent(name: str) -> str | None:
    """Load the library once; return None when it is loaded, else the reason it is not."""
    if name not in _absent:
        _absent[name] = _load(name)
    return _absent[name]


def host() -> ModuleType | None:
    """Return the pybind11 module, or None where it is absent."""
    return importlib.import_module("sidechain._host") if absent("_host") is None else None


def load() -> None:
    """Load the op libraries that this torch can use."""
    cap = os.environ.get("SIDECHAIN_ISA")
    if cap is not None and cap not in _ISAS:
        warnings.warn(
            f"sidechain: expected SIDECHAIN_ISA to be one of {', '.join(_ISAS)}, got {cap!r}; "
            "it is ignored",
            stacklevel=2,
        )
    absent("_C")
    absent("_C_cuda")


def _load(name: str) -> str | None:
    if not enabled():
        return "disabled by SIDECHAIN_NATIVE=0"
    if name == "_host":
        try:
            importlib.import_module("sidechain._host")
        except ModuleNotFoundError:
            return _not_built(name)
        except ImportError as error:
            return f"cannot load _host: {error}"
        return None
    path = _folder / f"{name}.abi3.so"
    if not path.exists():
        return _not_built(name)
    if name == "_C_cuda" and torch.version.cuda is None:
        return "torch is a CPU build"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        reason = f"cannot load {path.name}: {str(error).splitlines()[0]}"
        warnings.warn(f"sidechain: {reason}; the reference is used instead", stacklevel=2)
        return reason
    return None


def _not_built(name: str) -> str:
    if name == "_C_cuda":
        return "built without CUDA: install with nvcc on PATH and SIDECHAIN_CUDA=1"
    return "not built: install with a C++ compiler and without SIDECHAIN_NATIVE=0"
