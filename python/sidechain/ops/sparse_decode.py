# SPDX-License-Identifier: Apache-2.0
"""``sparse_decode``: decode sparse codes; ``sparse_decode_loss``: and the loss in one read."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference import sparse_decode as _reference
from . import _library
from ._code_checks import FLOATS, SINGLE, Checks, first_tensor

_WITHOUT = {"triton": "gathers are memory-bound: the CUDA C++ kernel covers the GPU"}


class DecodeLoss(NamedTuple):
    """What `sparse_decode_loss` returns."""

    error: Tensor  # [N, d] float32, x_hat - target
    loss: Tensor  # [N] float32, |error|^2 of each row
    dvalues: Tensor  # shape of values, float32


def sparse_decode(
    values: Tensor,
    indices: Tensor,
    w_dec: Tensor,
    b_dec: Tensor | None = None,
    *,
    offsets: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Decode sparse codes.

    x_hat[n] = b_dec + sum_j values[n, j] w_dec[indices[n, j]]. An index outside [0, F), such as
    the -1 of an unused slot, stands for nothing, and so do CSR entries behind offsets[N].

    Args:
        values: [N, K] float32, or [nnz] with offsets.
        indices: int32, shape of values, without duplicates within a row.
        w_dec: decoder rows [F, d], float32 | float16 | bfloat16, last dim contiguous.
        b_dec: [d] float32. None = 0.
        offsets: row starts [N + 1] int64 of codes in CSR form. None = fixed width.
        backend: "auto", or one of "reference", "cpu", "cuda" for tests and benches.

    Returns:
        x_hat [N, d] float32.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: a shape does not fit.
        RuntimeError: tensors on different devices, or the backend cannot run here.

    Differentiable in: values, w_dec, b_dec (once). Accumulates in float32. Deterministic: yes,
    forward and backward, for any number of threads. float64 is served by the reference.
    Backends: cpu (avx512 / avx2 / baseline), cuda (sm80+), reference.
    Source: Gao et al. 2024, arXiv:2406.04093, section 2.
    """
    args = (values, indices, w_dec, b_dec, offsets)
    _check(*args)
    if _to_reference("sparse_decode", backend, w_dec):
        return _reference.sparse_decode(*args)
    out: Tensor = torch.ops.sidechain.sparse_decode.default(*args)
    return out


def sparse_decode_loss(
    values: Tensor,
    indices: Tensor,
    w_dec: Tensor,
    b_dec: Tensor | None,
    target: Tensor,
    *,
    offsets: Tensor | None = None,
    row_weight: Tensor | None = None,
    backend: str = "auto",
) -> DecodeLoss:
    """Decode sparse codes, compare with the target and give the gradient of the codes.

    error = x_hat - target with x_hat as in `sparse_decode`; loss[n] = |error[n]|^2;
    dvalues[n, j] = row_weight[n] <error[n], w_dec[indices[n, j]]>, the gradient of
    sum_n row_weight[n] loss[n] / 2 (0 in slots that stand for nothing). The decoder rows are
    gathered once for both products. Slots with value 0 and a valid index get their true
    derivative; that a ReLU passes none of it on is the business of `sae_update_`.

    Args:
        values: [N, K] float32, or [nnz] with offsets.
        indices: int32, shape of values, without duplicates within a row.
        w_dec: decoder rows [F, d], float32 | float16 | bfloat16, last dim contiguous.
        b_dec: [d] float32. None = 0.
        target: [N, d], float32 | float16 | bfloat16, last dim contiguous.
        offsets: row starts [N + 1] int64 of codes in CSR form. None = fixed width.
        row_weight: [N] float32. None = 1.
        backend: "auto", or one of "reference", "cpu", "cuda" for tests and benches.

    Returns:
        `DecodeLoss` of error [N, d], loss [N] and dvalues (shape of values), all float32.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: a shape does not fit.
        RuntimeError: tensors on different devices, or the backend cannot run here.
        NotImplementedError: a gradient is asked for.

    Differentiable in: nothing, it is a hand-written step; `sparse_decode` is differentiable.
    Accumulates in float32. Deterministic: yes, for any number of threads. float64 is served by
    the reference. Backends: cpu (avx512 / avx2 / baseline), cuda (sm80+), reference.
    """
    args = (values, indices, w_dec, b_dec, target, offsets, row_weight)
    _check_loss(*args)
    if torch.is_grad_enabled():
        for t in (values, w_dec, b_dec, target, row_weight):
            if t is not None and t.requires_grad:
                raise NotImplementedError(
                    "sparse_decode_loss: expected tensors that need no gradient "
                    "[sparse_decode is differentiable], got requires_grad=True"
                )
    if _to_reference("sparse_decode_loss", backend, w_dec):
        return DecodeLoss(*_reference.sparse_decode_loss(*args))
    return DecodeLoss(*torch.ops.sidechain.sparse_decode_loss.default(*args))


def _to_reference(op: str, backend: str, w_dec: Tensor) -> bool:
    if backend != "auto":
        _library.require(op, backend, w_dec.device)
    return backend == "reference" or (backend == "auto" and w_dec.dtype == torch.float64)


def _check(
    values: Tensor,
    indices: Tensor,
    w_dec: Tensor,
    b_dec: Tensor | None,
    offsets: Tensor | None,
    op: str = "sparse_decode",
) -> tuple[Checks, int]:
    checks = first_tensor(op, "w_dec", w_dec)
    checks.tensor("w_dec", w_dec, FLOATS, ("F", "d"), "one row a feature")
    rows = checks.codes(values, indices, offsets)
    if b_dec is not None:
        checks.tensor("b_dec", b_dec, SINGLE, (w_dec.shape[1],), "d of w_dec")
    return checks, rows


def _check_loss(
    values: Tensor,
    indices: Tensor,
    w_dec: Tensor,
    b_dec: Tensor | None,
    target: Tensor,
    offsets: Tensor | None,
    row_weight: Tensor | None,
) -> int:
    checks, rows = _check(values, indices, w_dec, b_dec, offsets, "sparse_decode_loss")
    checks.tensor("target", target, FLOATS, (rows, w_dec.shape[1]), "N of the codes, d of w_dec")
    if row_weight is not None:
        checks.tensor("row_weight", row_weight, SINGLE, (rows,), "N of the codes")
    return rows


def _fake(*args: Any) -> Tensor:
    _, rows = _check(*args)
    w_dec: Tensor = args[2]
    return w_dec.new_empty((rows, w_dec.shape[1]), dtype=args[0].dtype)


def _fake_backward(
    grad: Tensor,
    values: Tensor,
    indices: Tensor,
    w_dec: Tensor,
    offsets: Tensor | None,
    need_values: bool,
    need_table: bool,
) -> tuple[Tensor, Tensor]:
    dvalues = values.new_empty(values.shape) if need_values else values.new_empty(0)
    return dvalues, w_dec.new_empty(w_dec.shape if need_table else (0,))


def _fake_loss(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows = _check_loss(*args)
    values, w_dec = args[0], args[2]
    error = w_dec.new_empty((rows, w_dec.shape[1]), dtype=values.dtype)
    return error, values.new_empty(rows), values.new_empty(values.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, indices, w_dec, _, offsets = inputs
    ctx.save_for_backward(values, indices, w_dec, offsets)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    values, indices, w_dec, offsets = ctx.saved_tensors
    need_values, _, need_table, need_bias, _ = ctx.needs_input_grad
    dvalues = dtable = None
    if need_values or need_table:
        dvalues, dtable = torch.ops.sidechain.sparse_decode_backward.default(
            grad.contiguous(), values, indices, w_dec, offsets, need_values, need_table
        )
    return (
        dvalues if need_values else None,
        None,
        dtable if need_table else None,
        grad.sum(0) if need_bias else None,
        None,
    )


def _once(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    raise NotImplementedError(
        "sparse_decode: expected to be differentiated once, got a second time "
        "[backend='reference' can be differentiated again]"
    )


_library.define(
    "sparse_decode(Tensor values, Tensor indices, Tensor w_dec, Tensor? b_dec, Tensor? offsets)"
    " -> Tensor",
    reference=_reference.sparse_decode,
    fake=_fake,
    without=_WITHOUT,
)
_library.define(
    "sparse_decode_backward(Tensor grad, Tensor values, Tensor indices, Tensor w_dec, "
    "Tensor? offsets, bool need_values, bool need_table) -> (Tensor, Tensor)",
    reference=_reference.sparse_decode_backward,
    fake=_fake_backward,
    without=_WITHOUT,
)
_library.define(
    "sparse_decode_loss(Tensor values, Tensor indices, Tensor w_dec, Tensor? b_dec, "
    "Tensor target, Tensor? offsets, Tensor? row_weight) -> (Tensor, Tensor, Tensor)",
    reference=_reference.sparse_decode_loss,
    fake=_fake_loss,
    without=_WITHOUT,
)
torch.library.register_autograd(
    "sidechain::sparse_decode", _backward, setup_context=_setup, lib=_library.library
)
torch.library.register_autograd("sidechain::sparse_decode_backward", _once, lib=_library.library)
# The public function refuses gradients; below it autograd has nothing to do.
_library.library.impl("sparse_decode_loss", torch.library.fallthrough_kernel, "Autograd")
