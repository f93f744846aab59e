# SPDX-License-Identifier: Apache-2.0
"""``attention_tap``: cross-attention over a bank of contexts that also captures its output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference import attention_tap as _reference
from ..reference.tap_structs import NO_CAPTURE, Capture
from . import _checks, _library

WIDEST_HEAD = 128


def attention_tap(
    q: Tensor,
    k_bank: Tensor,
    v_bank: Tensor,
    *,
    context_index: Tensor | None = None,
    context_mask: Tensor | None = None,
    scale: float | None = None,
    capture: Capture | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attend to one cached context per row and capture the output of every head.

    With m = context_index[r], kv head g = h // (H / Hkv), and s over the tokens of context m where
    context_mask holds: p[s] = softmax_s(scale <q[r, t, h], k_bank[m, s, g]>),
    out[r, t, h] = sum_s p[s] v_bank[m, s, g].

    A row whose index lies outside [0, M), or whose context has no token left, gives zeros and
    reads neither keys nor values: index -1 is the row of a model whose unconditional context
    projects to zero keys and values.

    Capture is that of `tap_` with C = H D, fed with the output (its zero rows too). The projection
    that follows attention is linear, so the mean of its output is the projection of the captured
    mean.

    Everything that decides what happens is a tensor on the device of q, so that changing a
    context, a mask or a slot recompiles nothing and waits for nothing.

    Args:
        q: queries [R, T, H, D], float32 | float16 | bfloat16 (float64 in the reference only), last
            dim contiguous, any other strides: a view of [R, T, H D] or a transposed [R, H, T, D].
            1 <= D <= 128.
        k_bank: keys [M, S, Hkv, D], M >= 1, S >= 1, Hkv divides H, dtype of q, last dim contiguous.
        v_bank: values [M, S, Hkv, D], likewise.
        context_index: context of each row [R] int32, -1 for none. None = 0.
        context_mask: tokens of each context that may be read [M, S] bool; what is masked is not
            read. None = all.
        scale: factor of the scores. None = 1 / sqrt(D).
        capture: buffers for the output [R, T, H D]. None = no capture.
        backend: "auto" | "reference" | "cpu" | "triton"; others than "auto" are for tests and
            benches and bypass the choice made by device.

    Returns:
        out [R, T, H, D], contiguous, dtype of q; `out.flatten(2)` is what the projection takes.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: a shape or a value does not fit.
        RuntimeError: tensors on different devices, or the backend cannot run here.
        NotImplementedError: a gradient is asked for.

    Differentiable in: nothing; `sidechain.reference.attention_tap.attend` is the differentiable
    form. Accumulates in float32; captures see the output before it is rounded to the dtype of q
    where a kernel runs. Deterministic: yes, for any number of threads.
    Backends: cpu (avx512 / avx2 / baseline), triton (sm80+), reference.
    Under `torch.compile` the reference is traced.
    Source: Vaswani et al. 2017, arXiv:1706.03762, eq. 1; softmax over blocks of the context as in
    Dao et al. 2022, arXiv:2205.14135.
    """
    _checks.struct("attention_tap", "capture", capture, Capture)
    _checks.is_tensor("attention_tap", "q", q, _checks.ANY_FLOAT)
    given = NO_CAPTURE if capture is None else capture
    inputs = (q, k_bank, v_bank, context_index, context_mask, scale)
    grad = torch.is_grad_enabled()
    if grad:
        _refuse_gradient(q, k_bank, v_bank)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if backend == "auto" and not torch.compiler.is_compiling():
        try:
            torch.ops.sidechain.attention_tap.default(out, *inputs, *given)
        except RuntimeError:
            # The kernels refuse a bad call before they write; see tap_.
            _check(out, *inputs, given)
            if q.dtype != torch.float64:
                raise
            _reference.attention_tap_(out, *inputs, given)
    else:
        _check(out, *inputs, given)
        if backend not in ("auto", "reference"):
            _library.run("attention_tap", backend, q.device, (out, *inputs, *given))
        else:
            _reference.attention_tap_(out, *inputs, given)
    if grad and not torch.compiler.is_compiling():
        _checks.count_writes(*given[:4])
    return out


def _refuse_gradient(*tensors: Tensor) -> None:
    for t in tensors:
        if isinstance(t, Tensor) and t.requires_grad:
            raise NotImplementedError(
                "attention_tap: expected tensors that need no gradient "
                "[sidechain.reference.attention_tap.attend is differentiable], "
                "got requires_grad=True"
            )


def _gathered(flat: tuple[Any, ...]) -> tuple[Any, ...]:
    """Gather the capture among the arguments of the schema."""
    return (*flat[:7], Capture(*flat[7:]))


def _checked_reference(*flat: Any) -> None:
    _check(*_gathered(flat))
    _reference.attention_tap_(*_gathered(flat))


def _fake(*flat: Any) -> None:
    _check(*_gathered(flat))


def _check(
    out: Tensor,
    q: Tensor,
    k_bank: Tensor,
    v_bank: Tensor,
    context_index: Tensor | None,
    context_mask: Tensor | None,
    scale: float | None,
    capture: Capture,
) -> None:
    op = "attention_tap"
    _checks.is_tensor(op, "q", q, _checks.ANY_FLOAT)
    if q.dim() != 4:
        raise ValueError(f"{op}: expected q of shape [R, T, H, D], got {list(q.shape)}")
    _checks.last_contiguous(op, "q", q)
    rows, tokens, heads, width = q.shape
    if not 1 <= width <= WIDEST_HEAD or heads < 1:
        raise ValueError(
            f"{op}: expected q with H >= 1 and 1 <= D <= {WIDEST_HEAD}, got {list(q.shape)}"
        )
    device, same = q.device, (q.dtype,)
    _checks.tensor(op, "out", out, device, same, (rows, tokens, heads, width), "as q", like="q")
    if not out.is_contiguous():
        raise ValueError(f"{op}: expected out to be contiguous, got strides {list(out.stride())}")
    for name, bank in (("k_bank", k_bank), ("v_bank", v_bank)):
        shape = ("M", "S", "Hkv", width)
        _checks.tensor(op, name, bank, device, same, shape, "D=q.size(3)", like="q")
        _checks.last_contiguous(op, name, bank)
    contexts, length, kv_heads = k_bank.shape[:3]
    if v_bank.shape != k_bank.shape:
        raise ValueError(
            f"{op}: expected v_bank of shape {list(k_bank.shape)} (as k_bank), "
            f"got {list(v_bank.shape)}"
        )
    if contexts < 1 or length < 1:
        raise ValueError(f"{op}: expected k_bank with M >= 1 and S >= 1, got {list(k_bank.shape)}")
    if kv_heads < 1 or heads % kv_heads != 0:
        raise ValueError(
            f"{op}: expected k_bank with Hkv that divides H={heads}, got Hkv={kv_heads}"
        )
    if context_index is not None:
        why = "R=q.size(0)"
        _checks.tensor(
            op, "context_index", context_index, device, _checks.INT32, (rows,), why, like="q"
        )
    if context_mask is not None:
        fits = (contexts, length)
        why = "M, S of k_bank"
        _checks.tensor(op, "context_mask", context_mask, device, _checks.BOOL, fits, why, like="q")
    if scale is not None and not isinstance(scale, int | float):
        raise TypeError(f"{op}: expected scale to be a number, got {type(scale).__name__}")
    sizes, wide = (rows, tokens, heads * width), q.dtype == torch.float64
    _checks.captures(op, capture, device, sizes, wide, like="q", channels_of="R, H D of q")


_library.define(
    "attention_tap(Tensor(a!) out, Tensor q, Tensor k_bank, Tensor v_bank, "
    "Tensor? context_index, Tensor? context_mask, float? scale, Tensor(b!)? sums, "
    "Tensor(c!)? squares, Tensor(d!)? counts, Tensor(e!)? ring, Tensor? capture_slot, "
    "Tensor? capture_mask) -> ()",
    reference=_checked_reference,
    fake=_fake,
    without={"cuda": "attention_tap is attention-shaped: the Triton kernel covers the GPU"},
)
# The public function refuses gradients; below it autograd has nothing to do.
_library.library.impl("attention_tap", torch.library.fallthrough_kernel, "Autograd")
