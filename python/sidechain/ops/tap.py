# SPDX-License-Identifier: Apache-2.0
"""``tap_``: one pass over the activations of a site that captures them and steers them in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference import tap as _reference
from ..reference.tap_structs import NO_CAPTURE, NO_STEERING, Capture, Steering
from . import _checks, _library


def tap_(
    x: Tensor,
    capture: Capture | None = None,
    steering: Steering | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Capture the activations of a site, then steer them, in one pass and in place.

    The formulas stand at `Capture` and `Steering`. Everything that decides what happens is a
    tensor on the device of x, so that changing a strength, a slot or a mask recompiles nothing and
    waits for nothing.

    Args:
        x: activations [R, T, C], float32 | float16 | bfloat16 (float64 in the reference only), any
            outer strides, last dim contiguous. Written in place.
        capture: buffers that see x before it is steered. None = no capture.
        steering: directions to add, with strength or removal. None = no steering.
        backend: "auto" | "reference" | "cpu" | "cuda"; others than "auto" are for tests and
            benches and bypass the choice made by device.

    Returns:
        x itself.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: a shape or a value does not fit.
        RuntimeError: tensors on different devices, or the backend cannot run here.
        NotImplementedError: a gradient is asked for.

    Differentiable in: nothing; `sidechain.reference.tap.tap` is the differentiable form.
    Accumulates in float32. Deterministic: yes, for any number of threads.
    Backends: cpu (avx512 / avx2 / baseline), cuda (sm80+), reference.
    Under `torch.compile` the reference is traced, which Inductor fuses into its neighbours.
    """
    _checks.struct("tap_", "capture", capture, Capture)
    _checks.struct("tap_", "steering", steering, Steering)
    grad = torch.is_grad_enabled()
    if grad:
        _refuse_gradient(x, steering)
    if backend == "auto" and not torch.compiler.is_compiling():
        try:
            torch.ops.sidechain.tap_.default(
                x,
                *(NO_STEERING if steering is None else steering),
                *(NO_CAPTURE if capture is None else capture),
            )
        except RuntimeError:
            # The kernels refuse a bad call before they write; saying what is wrong with it in
            # front of every good call would cost more than the op of a small site.
            _check(x, capture, steering)
            if x.dtype != torch.float64:
                raise
            _reference.tap_(x, capture, steering)
    else:
        _check(x, capture, steering)
        if backend not in ("auto", "reference"):
            flat = (x, *(steering or NO_STEERING), *(capture or NO_CAPTURE))
            _library.run("tap_", backend, x.device, flat)
        else:
            _reference.tap_(x, capture, steering)
    if grad and not torch.compiler.is_compiling():
        # A capture alone writes nothing to x: what backward has saved of it stays good.
        written = () if steering is None else (x,)
        _checks.count_writes(*written, *(capture or NO_CAPTURE)[:4])
    return x


def _refuse_gradient(x: Tensor, steering: Steering | None) -> None:
    for t in (x, *(steering or ())):
        if isinstance(t, Tensor) and t.requires_grad:
            raise NotImplementedError(
                "tap_: expected tensors that need no gradient [it writes in place; "
                "sidechain.reference.tap.tap is differentiable], got requires_grad=True"
            )


def _structs(flat: tuple[Any, ...]) -> tuple[Capture, Steering | None]:
    """Gather the arguments behind x in the schema."""
    steering, capture = flat[: len(NO_STEERING)], flat[len(NO_STEERING) :]
    absent = all(value is None for value in steering[:-1])
    return Capture(*capture), None if absent else Steering(*steering)


def _checked_reference(x: Tensor, *flat: Any) -> None:
    _check(x, *_structs(flat))
    _reference.tap_(x, *_structs(flat))


def _fake(x: Tensor, *flat: Any) -> None:
    _check(x, *_structs(flat))


def _check(x: Tensor, capture: Capture | None, steering: Steering | None) -> None:
    _checks.is_tensor("tap_", "x", x, _checks.ANY_FLOAT)
    if x.dim() != 3:
        raise ValueError(f"tap_: expected x of shape [R, T, C], got {list(x.shape)}")
    _checks.last_contiguous("tap_", "x", x)
    if steering is not None:
        _check_steering(x, steering)
    if capture is not None:
        sizes = (x.shape[0], x.shape[1], x.shape[2])
        _checks.captures("tap_", capture, x.device, sizes, x.dtype == torch.float64)


def _check_steering(x: Tensor, steering: Steering) -> None:
    rows, tokens, channels = x.shape
    vectors, slot, index, strength, removal, mask, _ = steering
    table = _checks.DOUBLES if x.dtype == torch.float64 else _checks.SINGLE
    op, name = "tap_", "steering.vectors"
    _checks.tensor(op, name, vectors, x.device, table, ("V", "S", channels), "C=x.size(-1)")
    _checks.last_contiguous(op, name, vectors)
    for name, value, dtypes, shape, why in (
        ("strength", strength, table, (rows,), "R=x.size(0)"),
        ("removal", removal, table, (rows,), "R=x.size(0)"),
        ("index", index, _checks.INT32, (rows,), "R=x.size(0)"),
        ("slot", slot, _checks.INT64, (1,), "one S index"),
    ):
        if value is not None:
            _checks.tensor(op, f"steering.{name}", value, x.device, dtypes, shape, why)
    if vectors.numel() == 0 and channels > 0:
        raise ValueError(
            f"tap_: expected steering.vectors with V >= 1 and S >= 1, got {list(vectors.shape)}"
        )
    if strength is None and removal is None:
        raise ValueError("tap_: expected strength or removal in steering, got neither")
    if mask is not None:
        _checks.token_mask("tap_", "steering.mask", mask, x.device, rows, tokens)


_library.define(
    "tap_(Tensor(a!) x, Tensor? vectors, Tensor? steer_slot, Tensor? index, Tensor? strength, "
    "Tensor? removal, Tensor? steer_mask, bool renorm, Tensor(b!)? sums, Tensor(c!)? squares, "
    "Tensor(d!)? counts, Tensor(e!)? ring, Tensor? capture_slot, Tensor? capture_mask) -> ()",
    reference=_checked_reference,
    fake=_fake,
    without={"triton": "tap_ is memory-bound: the CUDA C++ kernel covers the GPU"},
)
# The public function refuses gradients; below it autograd has nothing to do.
_library.library.impl("tap_", torch.library.fallthrough_kernel, "Autograd")
