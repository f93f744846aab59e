# SPDX-License-Identifier: Apache-2.0
"""``topk_encode``: sparse codes of a dictionary without ever holding its pre-activations."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _device
from ..reference import topk_encode as _reference
from . import _checks, _library
from ._topk_encode import PRECISIONS
from .encoder_structs import Encoder

MODES = ("topk", "batch_topk", "threshold")
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
    encoder: Encoder,
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
    w_enc were rounded to bfloat16; on a CPU, where that gains no time, by the reference only.
    "int8": candidates are chosen by 8-bit products and valued as
    in "fp32": right values, but a feature near the k-th place may be missed (threshold mode: one
    near the threshold).

    Args:
        x: activations [N, d], float32 | float16 | bfloat16 (float64: reference only), any strides.
        encoder: weights of F features, same dtypes.
        k: 1 <= k <= F; None in threshold mode.
        mode: "topk" | "batch_topk" | "threshold".
        threshold: a number or [F], threshold mode only. Below 0 it acts as 0.
        precision: "fp32" | "bf16" (not on a CPU) | "int8".
        guess: lower bound of the k-th value of each row [N] or of all [1], float32, for example
            a running average. Changes the speed, never the result; on a GPU only batch_topk uses
            it.
        backend: "auto" | "reference" | "cpu" | "triton"; others than "auto" are for tests and
            benches.

    Returns:
        `Codes`: values [N, k] float32, indices [N, k] int32 and None; or values [nnz], indices
        [nnz] and offsets [N + 1] int64. (float64 values where x is float64.)

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: a shape or a value does not fit.
        NotImplementedError: "bf16" on a CPU.
        RuntimeError: tensors on different devices, the backend cannot run here, or the first call
            on a device is captured in a CUDA graph.

    Differentiable in: x, w_enc, b_enc, b_pre, once, as the dense encoder is at the codes kept
    (bf16: with the rounded operands). Deterministic: yes, for any number of threads.
    Memory: no [N, F] array; a quantised copy of w_enc and some multiples of k candidates a row; on
    a GPU also the products of one chunk of rows (32 MiB, or 512 rows).
    The kernels screen in narrow numbers under an error bound and value the candidates exactly
    (csrc/cpu/topk/README.md); a row that the bound cannot decide is computed in full and counted by
    `topk_encode_fallbacks`.
    On a GPU the screen is a product in float16 with a scale for each row, which also serves
    "int8" (with the exact result: narrower products save nothing there below F / k = 1000).
    mode="topk" never waits for the host and can be captured in a CUDA graph, after a first call
    outside of one; the lists of the other modes have sizes that the host must know, for which it
    waits once, and once more if the guess was too high or the lists outgrew their memory.
    Backends: cpu (avx512 / avx2 / baseline), triton (sm80+), reference.
    Under `torch.compile` a device without a kernel traces the reference as plain tensor ops; the
    list modes have sizes that depend on the data and need
    `torch._dynamo.config.capture_dynamic_output_shape_ops` for a full graph.
    Source: Gao et al. 2024 (arXiv:2406.04093, eq. 3); Bussmann et al. 2024 (arXiv:2412.06410).
    """
    _check_tensors(x, encoder, guess)
    limit = _check_mode(x, encoder.w_enc, mode, k, threshold)
    if backend != "auto":
        _library.require("topk_encode", backend, x.device)
    _check_precision(precision, backend, x.device)
    kept = 0 if k is None else k
    kernel = _library.has_kernel("topk_encode", x.device.type)
    plain = torch.compiler.is_compiling() and not kernel
    if backend == "reference" or plain or x.dtype == torch.float64:
        bf16 = precision == "bf16"
        if mode == "topk":
            return Codes(*_reference.topk_encode(x, *encoder, kept, bf16=bf16), None)
        return Codes(*_reference.topk_encode_ragged(x, *encoder, kept, limit, bf16=bf16))
    level = PRECISIONS.index(precision)
    offsets, counter = None, _counter(x)
    if mode == "topk":
        values, indices, fallbacks = _call("topk_encode", backend, x, *encoder, kept, level, guess)
    else:
        values, indices, offsets, fallbacks = _call(
            "topk_encode_ragged", backend, x, *encoder, kept, limit, level, guess
        )
    if counter is not None:
        counter += fallbacks  # on the device: reading the number would wait for it
    return Codes(values, indices, offsets)


def _call(op: str, backend: str, x: Tensor, *rest: Any) -> Any:
    """Call the op through the dispatcher, which has one kernel a device and knows the gradient."""
    if backend == "triton" and not x.is_cuda:  # interpreted, where the CPU has a kernel of its own
        return _library.run(op, backend, x.device, (x, *rest))
    return getattr(torch.ops.sidechain, op).default(x, *rest)


def topk_encode_fallbacks(*, reset: bool = False) -> int:
    """Return how many rows the screen could not decide since the start or the last reset.

    They were computed in full, which costs time and changes nothing. Compiled calls do not count;
    a call captured in a CUDA graph counts at every replay. Calls that run on several streams of a
    device at once may be counted short. Waits for the devices.

    Args:
        reset: start again at 0.
    """
    total = sum(int(count) for count in _fallbacks.values())
    if reset:
        for count in _fallbacks.values():
            count.zero_()  # in place: a CUDA graph may add to it
    return total


def _counter(x: Tensor) -> Tensor | None:
    """Return the counter of a device [1] int64; None if nothing runs: compiled, traced, meta.

    A counter made while a CUDA graph is captured would lie in the graph's memory, and every replay
    would set it back.
    """
    plain = type(x) in (Tensor, torch.nn.Parameter)
    if torch.compiler.is_compiling() or not plain or x.is_meta:
        return None
    found = _fallbacks.get(x.device)
    if found is None:
        if _device.capturing():
            raise RuntimeError(
                f"topk_encode: expected a first call on {x.device} before a CUDA graph is captured "
                "[it makes a counter that lives longer than the graph], got it within the capture"
            )
        with torch.inference_mode(False):
            fresh = torch.zeros(1, dtype=torch.int64, device=x.device)
        found = _fallbacks.setdefault(x.device, fresh)
    return found


def _check_tensors(
    x: Tensor,
    encoder: Encoder,
    guess: Tensor | None,
) -> None:
    _checks.is_tensor("topk_encode", "x", x, _checks.ANY_FLOAT)
    if x.dim() != 2:
        raise ValueError(f"topk_encode: expected x of shape [N, d], got {list(x.shape)}")
    if not isinstance(encoder, Encoder):
        raise TypeError(
            f"topk_encode: expected encoder to be an Encoder, got {type(encoder).__name__}"
        )
    (rows, width), (w_enc, b_enc, b_pre) = x.shape, encoder
    dtypes = _dtypes(x)
    _checks.tensor("topk_encode", "w_enc", w_enc, x.device, dtypes, ("F", width), "d=x.size(1)")
    features = w_enc.shape[0]
    for name, t, size, why in (
        ("b_enc", b_enc, features, "F=w_enc.size(0)"),
        ("b_pre", b_pre, width, "d=x.size(1)"),
    ):
        if t is not None:
            _checks.tensor("topk_encode", name, t, x.device, dtypes, (size,), why)
    if guess is not None:
        one = isinstance(guess, Tensor) and guess.dim() == 1 and guess.shape[0] == 1
        shape = (1 if one else rows,)
        why = "1 or N=x.size(0)"
        _checks.tensor("topk_encode", "guess", guess, x.device, _checks.SINGLE, shape, why)


def _dtypes(x: Tensor) -> tuple[torch.dtype, ...]:
    """Dtypes of the weights beside x; only the reference computes in float64."""
    return _checks.ANY_FLOAT if x.dtype == torch.float64 else _checks.FLOATS


def _check_mode(
    x: Tensor,
    w_enc: Tensor,
    mode: str,
    k: int | None,
    threshold: float | Tensor | None,
) -> Tensor | None:
    """Check what chooses the features; return the threshold as a tensor [1] or [F]."""
    if mode not in MODES:
        raise ValueError(
            f"topk_encode: expected mode to be one of {', '.join(MODES)}, got {mode!r}"
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
        shape = (w_enc.shape[0],)
        why = "F=w_enc.size(0)"
        _checks.tensor("topk_encode", "threshold", threshold, x.device, _dtypes(x), shape, why)
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


def _check_precision(precision: str, backend: str, device: torch.device) -> None:
    if precision not in PRECISIONS:
        raise ValueError(
            f"topk_encode: expected precision to be one of {', '.join(PRECISIONS)}, "
            f"got {precision!r}"
        )
    if precision == "bf16" and device.type == "cpu" and backend in ("auto", "cpu"):
        raise NotImplementedError(
            "topk_encode: expected precision='fp32' or 'int8' [on a CPU bfloat16 gains no time], "
            "got 'bf16'"
        )
