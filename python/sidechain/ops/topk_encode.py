# SPDX-License-Identifier: Apache-2.0
"""``topk_encode``: sparse codes of a dictionary without ever holding its pre-activations."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference import topk_encode as _reference
from . import _library

MODES = ("topk", "batch_topk", "threshold")
PRECISIONS = ("fp32", "bf16", "int8")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_DOUBLES = (*_FLOATS, torch.float64)
_fallbacks: dict[torch.device, Tensor] = {}


class Codes(NamedTuple):
    """Sparse codes: fixed width [N, K], or rows offsets[n] : offsets[n + 1] of flat lists.

    values: float32, positive where a feature is active.
    indices: int32, -1 in the empty slots of the fixed form.
    offsets: [N + 1] int64, None in the fixed form.
    """

    values: Tensor
    indices: Tensor
    offsets: Tensor | None


def topk_encode(
    x: Tensor,
    w_enc: Tensor,
    b_enc: Tensor | None = None,
    b_pre: Tensor | None = None,
    *,
    k: int | None = None,
    mode: str = "topk",
    threshold: float | Tensor | None = None,
    precision: str = "fp32",
    guess: Tensor | None = None,
    backend: str = "auto",
) -> Codes:
    """Encode activations into the features of a dictionary, keeping only the active ones.

    z[n, f] = relu(<x[n] - b_pre, w_enc[f]> + b_enc[f]), with x - b_pre formed in float32.

    mode="topk": the k largest z of every row, sorted by value descending, ties by index ascending;
    slots without a positive z hold value 0 and index -1. mode="batch_topk": the N * k largest z of
    the whole batch, ties by lowest row-major position. mode="threshold": every z > threshold[f].
    The last two return lists of each row, indices ascending, zeros never among them. A NaN counts
    as larger than every number, in every mode: it shows in the codes and is never dropped.

    precision="fp32": z is the sum in float64 of the products of float32 numbers, rounded once, so
    that the set does not depend on the order of summation. "bf16": the same after x - b_pre and
    w_enc were rounded to bfloat16. "int8": candidates are chosen by 8-bit products and valued as
    in "fp32": right values, but a feature near the k-th place may be missed (threshold mode: one
    near the threshold).

    Args:
        x: activations [N, d], float32 | float16 | bfloat16 (float64: reference only), any strides.
        w_enc: encoder [F, d], one row a feature, same dtypes, any strides.
        b_enc: [F], same dtypes. None = 0.
        b_pre: [d], same dtypes, subtracted from x. None = 0.
        k: 1 <= k <= F; None in threshold mode.
        mode: "topk" | "batch_topk" | "threshold".
        threshold: a number or [F], threshold mode only. Below 0 it acts as 0.
        precision: "fp32" | "bf16" | "int8".
        guess: lower bound of the k-th value of each row [N] or of all [1], float32, for example
            a running average. Changes the speed, never the result.
        backend: "auto" | "reference" | "cpu"; others than "auto" are for tests and benches.

    Returns:
        `Codes`: values [N, k] float32, indices [N, k] int32 and None; or values [nnz], indices
        [nnz] and offsets [N + 1] int64. (float64 values where x is float64.)

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: a shape or a value does not fit.
        RuntimeError: tensors on different devices, or the backend cannot run here.

    Differentiable in: x, w_enc, b_enc, b_pre, once, as the dense encoder is at the codes kept
    (bf16: with the rounded operands). Deterministic: yes, for any number of threads.
    Memory: no [N, F] array; a quantised copy of w_enc and some multiples of k candidates a row.
    The kernels screen in narrow integers under an error bound and value the candidates exactly; a
    row that the bound cannot decide is computed in full, counted by `topk_encode_fallbacks`.
    Backends: cpu (avx512 / avx2 / baseline), reference.
    Under `torch.compile` a device without a kernel traces the reference as plain tensor ops; the
    list modes have sizes that depend on the data and need
    `torch._dynamo.config.capture_dynamic_output_shape_ops` for a full graph.
    Source: Gao et al. 2024 (arXiv:2406.04093, eq. 3); Bussmann et al. 2024 (arXiv:2412.06410).
    """
    _check_tensors(x, w_enc, b_enc, b_pre, guess)
    limit = _check_mode(x, w_enc, mode, k, threshold, precision)
    if backend != "auto":
        _library.require("topk_encode", backend, x.device)
    kept = 0 if k is None else k
    plain = torch.compiler.is_compiling() and _library.unavailable("topk_encode", x.device.type)
    if backend == "reference" or plain or x.dtype == torch.float64:
        bf16 = precision == "bf16"
        if mode == "topk":
            return Codes(*_reference.topk_encode(x, w_enc, b_enc, b_pre, kept, bf16=bf16), None)
        return Codes(
            *_reference.topk_encode_ragged(x, w_enc, b_enc, b_pre, kept, limit, bf16=bf16)
        )
    level = PRECISIONS.index(precision)
    offsets = None
    if mode == "topk":
        values, indices, fallbacks = torch.ops.sidechain.topk_encode.default(
            x, w_enc, b_enc, b_pre, kept, level, guess
        )
    else:
        values, indices, offsets, fallbacks = torch.ops.sidechain.topk_encode_ragged.default(
            x, w_enc, b_enc, b_pre, kept, limit, level, guess
        )
    if not torch.compiler.is_compiling():
        _count(fallbacks)
    return Codes(values, indices, offsets)


def topk_encode_fallbacks(*, reset: bool = False) -> int:
    """Rows since the start or the last reset that the screen could not decide.

    They were computed in full, which costs time and changes nothing. Compiled calls do not count.

    Args:
        reset: start again at 0.
    """
    total = sum(int(count) for count in _fallbacks.values())
    if reset:
        _fallbacks.clear()
    return total


def _count(fallbacks: Tensor) -> None:
    """Add on the device: reading the number would wait for it."""
    with torch.inference_mode(False):
        total = _fallbacks.setdefault(
            fallbacks.device, torch.zeros(1, dtype=torch.int64, device=fallbacks.device)
        )
        total += fallbacks


def _check_tensors(
    x: Tensor,
    w_enc: Tensor,
    b_enc: Tensor | None,
    b_pre: Tensor | None,
    guess: Tensor | None,
) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"topk_encode: expected x to be a tensor, got {type(x).__name__}")
    dtypes = _DOUBLES if x.dtype == torch.float64 else _FLOATS
    _tensor("x", x, x, _DOUBLES, ("N", "d"), "rows, width")
    width = x.shape[1]
    _tensor("w_enc", w_enc, x, dtypes, ("F", width), "d=x.size(1)")
    if b_enc is not None:
        _tensor("b_enc", b_enc, x, dtypes, (w_enc.shape[0],), "F=w_enc.size(0)")
    if b_pre is not None:
        _tensor("b_pre", b_pre, x, dtypes, (width,), "d=x.size(1)")
    if guess is not None:
        one = isinstance(guess, Tensor) and guess.dim() == 1 and guess.shape[0] == 1
        _tensor("guess", guess, x, _FLOATS[:1], (1 if one else x.shape[0],), "1 or N=x.size(0)")


def _check_mode(
    x: Tensor,
    w_enc: Tensor,
    mode: str,
    k: int | None,
    threshold: float | Tensor | None,
    precision: str,
) -> Tensor | None:
    """Check what chooses the features; return the threshold as a tensor [1] or [F]."""
    if mode not in MODES:
        raise ValueError(f"topk_encode: expected mode to be one of {', '.join(MODES)}, got {mode!r}")
    if precision not in PRECISIONS:
        raise ValueError(
            f"topk_encode: expected precision to be one of {', '.join(PRECISIONS)}, "
            f"got {precision!r}"
        )
    if mode != "threshold":
        if threshold is not None:
            raise ValueError(f"topk_encode: expected no threshold [mode={mode!r}], got one")
        if not isinstance(k, int) or isinstance(k, bool):
            raise TypeError(
                f"topk_encode: expected k to be an int [mode={mode!r}], got {type(k).__name__}"
            )
        if not 1 <= k <= w_enc.shape[0]:
            raise ValueError(
                f"topk_encode: expected 1 <= k <= F={w_enc.shape[0]} [w_enc.size(0)], got {k}"
            )
        return None
    if k is not None:
        raise ValueError(f"topk_encode: expected no k [mode='threshold'], got {k}")
    if isinstance(threshold, Tensor):
        dtypes = _DOUBLES if x.dtype == torch.float64 else _FLOATS
        _tensor("threshold", threshold, x, dtypes, (w_enc.shape[0],), "F=w_enc.size(0)")
        return threshold
    if not isinstance(threshold, int | float) or isinstance(threshold, bool):
        raise TypeError(
            "topk_encode: expected threshold to be a number or a tensor [mode='threshold'], "
            f"got {type(threshold).__name__}"
        )
    if threshold != threshold:
        raise ValueError("topk_encode: expected threshold to be a number, got nan")
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.full((1,), float(threshold), dtype=wide, device=x.device)


def _tensor(
    name: str,
    t: Tensor,
    x: Tensor,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int | str, ...],
    why: str,
) -> None:
    """Check type, dtype, device and shape; a letter in `shape` stands for any size."""
    if not isinstance(t, Tensor):
        raise TypeError(f"topk_encode: expected {name} to be a tensor, got {type(t).__name__}")
    if t.dtype not in dtypes:
        names = " | ".join(str(d).removeprefix("torch.") for d in dtypes)
        got = str(t.dtype).removeprefix("torch.")
        raise TypeError(f"topk_encode: expected {name} of {names}, got {got}")
    if t.device != x.device:
        raise RuntimeError(
            f"topk_encode: expected {name} on {x.device} [device of x], got {t.device}"
        )
    fits = t.dim() == len(shape) and all(
        isinstance(want, str) or want == got for want, got in zip(shape, t.shape, strict=True)
    )
    if not fits:
        expected = ", ".join(map(str, shape))
        raise ValueError(
            f"topk_encode: expected {name} of shape [{expected}] ({why}), got {list(t.shape)}"
        )


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
    need_x: bool,
    need_w: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    bf16 = PRECISIONS[precision] == "bf16"
    dx, dw, db = _reference.topk_encode_backward(
        grad, indices, offsets, x, w_enc, b_pre, bf16=bf16
    )
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
    need_x: bool,
    need_w: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = _sum_dtype(x)
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


_WITHOUT = {
    "cuda": "matrix-shaped work on the GPU is Triton's",
    "triton": "no kernel yet: the reference runs on the GPU",
}
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
