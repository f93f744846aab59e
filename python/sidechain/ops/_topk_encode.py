# SPDX-License-Identifier: Apache-2.0
"""Schemas, fakes and gradients of ``topk_encode``; the public function is in `topk_encode`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference import topk_encode as _reference
from . import _library

PRECISIONS = ("fp32", "bf16", "int8")


def _fixed(
    x: Tensor,
    w_enc: Tensor,
    b_enc: Tensor | None,
    b_pre: Tensor | None,
    k: int,
    precision: int,
    guess: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    bf16 = PRECISIONS[precision] == "bf16"
    values, indices = _reference.topk_encode(x, w_enc, b_enc, b_pre, k, bf16=bf16)
    return values.contiguous(), indices, x.new_zeros(1, dtype=torch.int64)


def _ragged(
    x: Tensor,
    w_enc: Tensor,
    b_enc: Tensor | None,
    b_pre: Tensor | None,
    k: int,
    threshold: Tensor | None,
    precision: int,
    guess: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    bf16 = PRECISIONS[precision] == "bf16"
    codes = _reference.topk_encode_ragged(x, w_enc, b_enc, b_pre, k, threshold, bf16=bf16)
    return *codes, x.new_zeros(1, dtype=torch.int64)


def _backward(
    grad: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    x: Tensor,
    w_enc: Tensor,
    b_pre: Tensor | None,
    precision: int,
    *needed: bool,  # the gradient of x; that of w_enc
) -> tuple[Tensor, Tensor, Tensor]:
    bf16 = PRECISIONS[precision] == "bf16"
    dx, dw, db = _reference.topk_encode_backward(grad, indices, offsets, x, w_enc, b_pre, bf16=bf16)
    need_x, need_w = needed
    return dx if need_x else dx.new_empty(0), dw if need_w else dw.new_empty(0), db


def _fixed_fake(
    x: Tensor,
    w_enc: Tensor,
    b_enc: Tensor | None,
    b_pre: Tensor | None,
    k: int,
    precision: int,
    guess: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    values = x.new_empty(x.shape[0], k, dtype=_sum_dtype(x))
    return values, values.new_empty(values.shape, dtype=torch.int32), _one_count(x)


def _ragged_fake(
    x: Tensor,
    w_enc: Tensor,
    b_enc: Tensor | None,
    b_pre: Tensor | None,
    k: int,
    threshold: Tensor | None,
    precision: int,
    guess: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    nnz = torch.library.get_ctx().new_dynamic_size()
    values = x.new_empty(nnz, dtype=_sum_dtype(x))
    indices = x.new_empty(nnz, dtype=torch.int32)
    return values, indices, x.new_empty(x.shape[0] + 1, dtype=torch.int64), _one_count(x)


def _backward_fake(
    grad: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    x: Tensor,
    w_enc: Tensor,
    b_pre: Tensor | None,
    precision: int,
    *needed: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = _sum_dtype(x)
    need_x, need_w = needed
    dx = x.new_empty(x.shape if need_x else (0,), dtype=dtype)
    dw = x.new_empty(w_enc.shape if need_w else (0,), dtype=dtype)
    return dx, dw, x.new_empty(w_enc.shape[0], dtype=dtype)


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _one_count(x: Tensor) -> Tensor:
    return x.new_empty(1, dtype=torch.int64)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, w_enc, b_enc, b_pre = inputs[:4]
    ragged = len(output) == 4
    ctx.save_for_backward(x, w_enc, b_enc, b_pre, output[1], output[2] if ragged else None)
    ctx.precision = inputs[6] if ragged else inputs[5]


def _gradients(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    """Gradients of the inputs of `topk_encode` or `topk_encode_ragged`."""
    x, w_enc, b_enc, b_pre, indices, offsets = ctx.saved_tensors
    need_x, need_w, need_b, need_pre = ctx.needs_input_grad[:4]
    dx, dw, db = torch.ops.sidechain.topk_encode_backward.default(
        grad, indices, offsets, x, w_enc, b_pre, ctx.precision, need_x or need_pre, need_w
    )
    unused = (None,) * (3 if offsets is None else 4)
    return (
        dx.to(x.dtype) if need_x else None,
        dw.to(w_enc.dtype) if need_w else None,
        db.to(b_enc.dtype) if need_b else None,
        dx.sum(0).neg().to(b_pre.dtype) if need_pre else None,
        *unused,
    )


def _refuse_second_gradient(ctx: Any, *_: Any) -> None:
    raise NotImplementedError(
        "topk_encode: expected one backward pass [the gradient is an op of its own; "
        'backend="reference" is differentiable twice], got a gradient of the gradient'
    )


_WITHOUT = {"cuda": "matrix-shaped work on the GPU is Triton's"}
_library.define(
    "topk_encode(Tensor x, Tensor w_enc, Tensor? b_enc, Tensor? b_pre, int k, int precision, "
    "Tensor? guess) -> (Tensor, Tensor, Tensor)",
    reference=_fixed,
    fake=_fixed_fake,
    without=_WITHOUT,
)
_library.define(
    "topk_encode_ragged(Tensor x, Tensor w_enc, Tensor? b_enc, Tensor? b_pre, int k, "
    "Tensor? threshold, int precision, Tensor? guess) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=_ragged,
    fake=_ragged_fake,
    without=_WITHOUT,
)
_library.define(
    "topk_encode_backward(Tensor grad, Tensor indices, Tensor? offsets, Tensor x, Tensor w_enc, "
    "Tensor? b_pre, int precision, bool need_x, bool need_w) -> (Tensor, Tensor, Tensor)",
    reference=_backward,
    fake=_backward_fake,
    without=_WITHOUT,
)
for _op in ("topk_encode", "topk_encode_ragged"):
    torch.library.register_autograd(
        f"sidechain::{_op}", _gradients, setup_context=_save, lib=_library.library
    )
torch.library.register_autograd(
    "sidechain::topk_encode_backward", _refuse_second_gradient, lib=_library.library
)
