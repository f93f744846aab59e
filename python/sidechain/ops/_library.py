# SPDX-License-Identifier: Apache-2.0
"""The one op library, and which backend of which op can run here."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from .. import _native, _triton

BACKENDS = ("reference", "cpu", "cuda", "triton")

# Kept alive for the life of the process: its destructor deregisters every op.
library = torch.library.Library("sidechain", "FRAGMENT")
_ops: dict[str, dict[str, str]] = {}
# What the loaded libraries brought. Asked for once, since torch.compile cannot trace the question.
_kernels: set[tuple[str, str]] = set()


def define(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    without: dict[str, str],
) -> None:
    """Register the schema, the reference (fallback on every device) and the fake of an op.

    Args:
        schema: schema string.
        reference: pure PyTorch implementation with the schema's signature.
        fake: checks and shapes only.
        without: backend -> why this op has no kernel there, by design.
    """
    name = library.define(schema, tags=(torch.Tag.pt2_compliant_tag,)) or schema.split("(")[0]
    name = name.split("::")[-1]
    library.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sidechain::{name}", fake, lib=library)
    _ops[name] = without


def unavailable(op: str, backend: str) -> str | None:
    """Say why a backend of an op cannot run here; None when it can."""
    if backend == "reference":
        return None
    if backend in _ops[op]:
        return _ops[op][backend]
    if backend == "triton":
        return _triton.absent()
    reason = _native.absent({"cpu": "_C", "cuda": "_C_cuda"}[backend])
    if reason is None and backend == "cuda" and not torch.cuda.is_available():
        return "no CUDA device"
    if reason is None and (op, backend) not in _kernels:
        return "the library that is loaded has no kernel of this op: build it again"
    return reason


def note_kernels() -> None:
    """Remember which kernels the native libraries registered; the reference serves the others."""
    for op in _ops:
        for backend, key in (("cpu", "CPU"), ("cuda", "CUDA")):
            if torch._C._dispatch_has_kernel_for_dispatch_key(f"sidechain::{op}", key):
                _kernels.add((op, backend))


def has_kernel(op: str, device: str) -> bool:
    """Tell whether a type of device has a kernel of an op, or the reference serves it."""
    backends = ("cuda", "triton") if device == "cuda" else (device,)
    return any((op, backend) in _kernels for backend in backends)


def planned(op: str) -> tuple[str, ...]:
    """The backends an op is meant to have, built here or not."""
    return tuple(b for b in BACKENDS if b not in _ops[op])


def backends() -> dict[str, dict[str, str | None]]:
    """Return {op: {backend: None if it can run here, else the reason}}."""
    return {op: {b: unavailable(op, b) for b in BACKENDS} for op in _ops}


def require(op: str, backend: str, device: torch.device) -> None:
    """Raise unless `backend` names one that can run `op` on `device`."""
    if backend not in BACKENDS:
        expected = ", ".join(("auto", *BACKENDS))
        raise ValueError(f"{op}: expected backend to be one of {expected}, got {backend!r}")
    reason = unavailable(op, backend)
    if reason is not None:
        raise RuntimeError(f"{op}: expected backend {backend!r} to be available, got: {reason}")
    wanted = {"cpu": "cpu", "cuda": "cuda", "triton": "cpu" if _triton.interpreting() else "cuda"}
    if backend in wanted and device.type != wanted[backend]:
        raise RuntimeError(
            f"{op}: expected tensors on {wanted[backend]} [backend={backend!r}], got {device}"
        )


def run(op: str, backend: str, device: torch.device, args: tuple[Any, ...]) -> Any:
    """Call `op` on the backend named, past the choice that the dispatcher makes."""
    require(op, backend, device)
    if backend == "triton":
        return _triton.launcher(op)(*args)
    return getattr(torch.ops.sidechain, op).default(*args)


def register_triton() -> None:
    """Let Triton serve CUDA devices for every op that has no native CUDA kernel loaded.

    Called once, after the native libraries: one winner per op, decided at import.
    """
    if torch.version.cuda is None or not _triton.installed():
        return
    native = _native.absent("_C_cuda") is None
    for op, without in _ops.items():
        if "triton" not in without and ("cuda" in without or not native):
            library.impl(op, functools.partial(_launch, op), "CUDA")
            _kernels.add((op, "triton"))


def _launch(op: str, *args: Any) -> Any:
    return _triton.launcher(op)(*args)
