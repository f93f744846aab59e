# SPDX-License-Identifier: Apache-2.0
"""``tap_``: one pass over the activations of a site that captures them and steers them in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference import tap as _reference
from . import _checks, _library


def tap_(
    x: Tensor,
    *,
    vectors: Tensor | None = None,
    steer_slot: Tensor | None = None,
    index: Tensor | None = None,
    strength: Tensor | None = None,
    removal: Tensor | None = None,
    steer_mask: Tensor | None = None,
    renorm: bool = False,
    sums: Tensor | None = None,
    squares: Tensor | None = None,
    counts: Tensor | None = None,
    ring: Tensor | None = None,
    capture_slot: Tensor | None = None,
    capture_mask: Tensor | None = None,
    ring_stride: int = 1,
    backend: str = "auto",
) -> Tensor:
    """Capture the activations of a site, then steer them, in one pass and in place.

    Capture, with s = capture_slot, over the tokens t of row r where capture_mask holds, before
    steering: sums[s, r] += sum_t x[r, t]; squares[s, r] += sum_t x[r, t]^2; counts[s, r] += number
    of tokens; ring[s, r, j] = x[r, j * ring_stride].

    Steering, with v = vectors[index[r], steer_slot], a = strength[r], b = removal[r]:
    y = x + (a - b * max(0, <x, v>)) v, and with renorm y *= |x| / |y| (y = 0 stays 0), written to
    the tokens where steer_mask holds. A row with a = 0 and b = 0, or whose index or slot lies
    outside the table, is not written: it stays bit-identical.

    Everything that decides what happens is a tensor on the device of x, so that changing a
    strength, a slot or a mask recompiles nothing and waits for nothing.

    Args:
        x: activations [R, T, C], float32 | float16 | bfloat16 (float64 in the reference only), any
            outer strides, last dim contiguous. Written in place.
        vectors: steering table [V, S, C] float32, last dim contiguous. None = no steering.
        steer_slot: S index [1] int64. None = 0.
        index: V index of each row [R] int32, -1 for none. None = 0.
        strength: a [R] float32. None = 0.
        removal: b [R] float32. None = 0.
        steer_mask: [R | 1, T] bool. None = all tokens.
        renorm: give every steered token the norm it had.
        sums: [S, R, C] float32, last dim contiguous. Accumulated into.
        squares: [S, R, C] float32, last dim contiguous. Accumulated into.
        counts: [S, R] float32. Accumulated into.
        ring: [S, R, ceil(T / ring_stride), C], float32 | float16 | bfloat16, last dim contiguous.
            Masked tokens keep what was there.
        capture_slot: S index [1] int64; outside the buffer nothing is captured. None = 0.
        capture_mask: [R | 1, T] bool. None = all tokens.
        ring_stride: distance of the tokens copied to `ring`, at least 1.
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
    args = (
        x, vectors, steer_slot, index, strength, removal, steer_mask, renorm,
        sums, squares, counts, ring, capture_slot, capture_mask, ring_stride,
    )  # fmt: skip
    grad = torch.is_grad_enabled()
    if grad:
        _refuse_gradient(x, vectors, strength, removal)
    if backend == "auto" and not torch.compiler.is_compiling():
        try:
            torch.ops.sidechain.tap_.default(*args)
        except RuntimeError:
            # The kernels refuse a bad call before they write; saying what is wrong with it in
            # front of every good call would cost more than the op of a small site.
            _check(*args)
            if x.dtype != torch.float64:
                raise
            _reference.tap_(*args)
    else:
        _check(*args)
        if backend not in ("auto", "reference"):
            _library.run("tap_", backend, x.device, args)
        else:
            _reference.tap_(*args)
    if grad and not torch.compiler.is_compiling():
        _checks.count_writes(x, sums, squares, counts, ring)
    return x


def _refuse_gradient(*tensors: Tensor | None) -> None:
    for t in tensors:
        if isinstance(t, Tensor) and t.requires_grad:
            raise NotImplementedError(
                "tap_: expected tensors that need no gradient [it writes in place; "
                "sidechain.reference.tap.tap is differentiable], got requires_grad=True"
            )


def _checked_reference(*args: Any) -> None:
    _check(*args)
    _reference.tap_(*args)


def _check(
    x: Tensor,
    vectors: Tensor | None,
    steer_slot: Tensor | None,
    index: Tensor | None,
    strength: Tensor | None,
    removal: Tensor | None,
    steer_mask: Tensor | None,
    renorm: bool,
    sums: Tensor | None,
    squares: Tensor | None,
    counts: Tensor | None,
    ring: Tensor | None,
    capture_slot: Tensor | None,
    capture_mask: Tensor | None,
    ring_stride: int,
) -> None:
    _checks.is_tensor("tap_", "x", x, _checks.ANY_FLOAT)
    if x.dim() != 3:
        raise ValueError(f"tap_: expected x of shape [R, T, C], got {list(x.shape)}")
    rows, tokens, channels = x.shape
    _checks.last_contiguous("tap_", "x", x)
    device = x.device
    wide = x.dtype == torch.float64
    table = _checks.DOUBLES if wide else _checks.SINGLE
    if vectors is not None:
        _checks.tensor(
            "tap_", "vectors", vectors, device, table, ("V", "S", channels), "C=x.size(-1)"
        )
        _checks.last_contiguous("tap_", "vectors", vectors)
        if vectors.numel() == 0 and channels > 0:
            raise ValueError(
                f"tap_: expected vectors with V >= 1 and S >= 1, got {list(vectors.shape)}"
            )
        if strength is None and removal is None:
            raise ValueError("tap_: expected strength or removal beside vectors, got neither")
        if strength is not None:
            _checks.tensor("tap_", "strength", strength, device, table, (rows,), "R=x.size(0)")
        if removal is not None:
            _checks.tensor("tap_", "removal", removal, device, table, (rows,), "R=x.size(0)")
        if index is not None:
            _checks.tensor("tap_", "index", index, device, _checks.INT32, (rows,), "R=x.size(0)")
        if steer_slot is not None:
            _checks.tensor(
                "tap_", "steer_slot", steer_slot, device, _checks.INT64, (1,), "one S index"
            )
        if steer_mask is not None:
            _checks.token_mask("tap_", "steer_mask", steer_mask, device, rows, tokens)
    else:
        for name, value in (
            ("strength", strength),
            ("removal", removal),
            ("index", index),
            ("steer_slot", steer_slot),
            ("steer_mask", steer_mask),
        ):
            if value is not None:
                raise ValueError(f"tap_: expected vectors beside {name}, got None")
    _checks.captures(
        "tap_", device, (rows, tokens, channels), wide,
        sums, squares, counts, ring, capture_slot, capture_mask, ring_stride,
    )  # fmt: skip


_library.define(
    "tap_(Tensor(a!) x, Tensor? vectors, Tensor? steer_slot, Tensor? index, Tensor? strength, "
    "Tensor? removal, Tensor? steer_mask, bool renorm, Tensor(b!)? sums, Tensor(c!)? squares, "
    "Tensor(d!)? counts, Tensor(e!)? ring, Tensor? capture_slot, Tensor? capture_mask, "
    "int ring_stride) -> ()",
    reference=_checked_reference,
    fake=_check,
    without={"triton": "tap_ is memory-bound: the CUDA C++ kernel covers the GPU"},
)
# The public function refuses gradients; below it autograd has nothing to do.
_library.library.impl("tap_", torch.library.fallthrough_kernel, "Autograd")
