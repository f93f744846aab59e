# SPDX-License-Identifier: Apache-2.0
"""``sae_update_``: gradients, projection, Adam and unit norm of an autoencoder, row by row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference import sae_update as _reference
from . import _checks, _library
from ._code_checks import DOUBLE, FLOATS, INT64, SINGLE, Checks, first_tensor

_COPIES = (torch.bfloat16, torch.float16)
# kMaxCodeGroups and kMaxPrefixes of csrc/include/sidechain/sae_update.h
_GROUPS_MOST = 4
PREFIXES_MOST = 16


class SaeMoments(NamedTuple):
    """Adam's moments; the matrices float32 or bfloat16 (all four alike), the biases float32."""

    enc_mean: Tensor  # [F, d_in]
    enc_square: Tensor  # [F, d_in]
    dec_mean: Tensor  # [F, d_out]
    dec_square: Tensor  # [F, d_out]
    bias_mean: Tensor | None = None  # [F], with b_enc
    bias_square: Tensor | None = None  # [F], with b_enc


class SaeCodes(NamedTuple):
    """One group of codes with the error they leave; see `sae_update_`."""

    values: Tensor  # [N, K] float32, or [nnz] with offsets
    indices: Tensor  # int32, shape of values
    dvalues: Tensor  # float32, shape of values
    error: Tensor  # [N, d_out] float32, or [P, N, d_out] with prefixes
    offsets: Tensor | None = None  # [N + 1] int64
    row_weight: Tensor | None = None  # [N] float32, already in dvalues


def sae_update_(
    w_enc: Tensor,
    w_dec: Tensor,
    b_enc: Tensor | None,
    moments: SaeMoments,
    x: Tensor,
    codes: SaeCodes | Sequence[SaeCodes],
    *,
    lr: Tensor,
    step: Tensor,
    b_pre: Tensor | None = None,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    unit_norm: bool = True,
    project: bool = True,
    clip_scale: Tensor | None = None,
    prefixes: Sequence[int] = (),
    first_feature: int = 0,
    last_fired: Tensor | None = None,
    fire_count: Tensor | None = None,
    row_step: Tensor | None = None,
    enc_copy: Tensor | None = None,
    dec_copy: Tensor | None = None,
    b_pre_grad: Tensor | None = None,
    grad_square: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Train the weights of a sparse autoencoder for one step, in place, without gradient tensors.

    With the entries (n, j) of all groups whose value is not 0 and f = indices[n, j], in fp32:
    g_dec[f] = sum row_weight[n] values[n, j] error[n];
    g_enc[f] = sum dvalues[n, j] (x[n] - b_pre);  g_b[f] = sum dvalues[n, j].
    Values of 0 pass no gradient: that is the ReLU. With `project`,
    g_dec[f] -= <g_dec[f], w_dec[f]> / |w_dec[f]|^2 w_dec[f]. Then, with g times clip_scale,
    m = beta1 m + (1 - beta1) g;  s = beta2 s + (1 - beta2) g^2;
    w = (1 - lr weight_decay) w - lr / (1 - beta1^step) m / (sqrt(s / (1 - beta2^step)) + eps),
    (no decay of b_enc), and with `unit_norm` w_dec[f] /= |w_dec[f]| where that is not 0. This is
    `torch.optim.AdamW` on the dense gradient, step for step; rows without entries move by their
    momentum as there. Each feature is one piece of work that reads and writes its rows once.

    Groups: AuxK and multi-TopK give further groups with an error and dvalues of their own.
    Matryoshka: with prefixes F_1 < ... < F_P every error is [P, N, d_out] and feature f reads
    error[p] of the first prefix with f < F_p, which has to hold the weighted sum of the errors of
    prefixes p .. P (`sparse_decode_loss` of the codes below F_p gives each of them, and dvalues is
    the weighted sum of theirs).

    Lazy rows: with `row_step` a row without entries is neither read nor written; when it wakes
    after dt steps its moments are first decayed by beta^(dt - 1) and its weight by the decay of dt
    steps. That leaves out the drift of sleeping rows, so it is not the dense Adam.

    bfloat16 moments are rounded stochastically by bits that are a function of step, feature and
    column alone (`sidechain.reference.sae_update.rounding_noise`).

    Args:
        w_enc: [F, d_in] float32, contiguous like every matrix written here. Written.
        w_dec: [F, d_out] float32. Written.
        b_enc: [F] float32, or None. Written.
        moments: `SaeMoments`. Written.
        x: input of the encoder [N, d_in], float32 | float16 | bfloat16, last dim contiguous.
        codes: one `SaeCodes`, or up to 4, all of N rows.
        lr: [1] float32.
        step: [1] int64, the number of this step, 1 for the first.
        b_pre: [d_in] float32, subtracted from x. None = 0.
        betas: of Adam.
        eps: of Adam.
        weight_decay: of AdamW, for both matrices.
        unit_norm: scale the decoder rows to norm 1 after the step.
        project: remove the gradient along the decoder rows.
        clip_scale: [1] float32, factor of all gradients. Clip exactly by `sae_gradient_square`
            before the call, or with a step's delay by `grad_square`. None = 1.
        prefixes: up to 16 ascending feature counts of Matryoshka groups, the last >= all features.
        first_feature: id of the first row held here, for feature shards. Other ids are ignored.
        last_fired: [F] int64, set to step where the first group has an entry.
        fire_count: [F] int64, incremented by the entries of the first group.
        row_step: [F] int64, the step each row was last written. None = no lazy rows.
        enc_copy: [F, d_in] bfloat16 | float16, receives the rounded new w_enc.
        dec_copy: [F, d_out] bfloat16 | float16, receives the rounded new w_dec.
        b_pre_grad: [d_in] float32, receives -sum_f g_b[f] w_enc[f] (old w_enc, not clipped).
        grad_square: [1] float32, receives the sum of squares of g (not clipped; w_enc, w_dec
            after projection, b_enc where there is one).
        backend: "auto", or one of "reference", "cpu", "cuda" for tests and benches.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: a shape or a value does not fit.
        RuntimeError: tensors on different devices, or the backend cannot run here.
        NotImplementedError: a gradient is asked for.

    Differentiable in: nothing. Accumulates in float32. Deterministic: bit for bit, for any number
    of threads. lr, step and clip_scale live on the device, so the step fits a CUDA graph.
    float64 is served by the reference. Backends: cpu (avx512 / avx2 / baseline), cuda (sm80+),
    reference. The projection is not taken from sum_j values dvalues, which equals
    <g_dec, w_dec> only where dvalues holds nothing but the reconstruction: the product costs
    nothing while the row is in cache.
    """
    groups = _groups("sae_update_", codes)
    args: tuple[Any, ...] = (
        w_enc, w_dec, b_enc, *_moments(moments), x, b_pre, *groups, lr, step, *betas, eps,
        weight_decay, unit_norm, project, clip_scale, list(prefixes), first_feature, last_fired,
        fire_count, row_step, enc_copy, dec_copy, b_pre_grad, grad_square,
    )  # fmt: skip
    _check(*args)
    if torch.is_grad_enabled():
        _refuse_gradient("sae_update_", args)
    if backend != "auto":
        _library.require("sae_update_", backend, w_dec.device)
    if backend == "reference" or w_dec.dtype == torch.float64:
        with torch.no_grad():
            _reference.sae_update_(*args)
    else:
        torch.ops.sidechain.sae_update_.default(*args)
        _written(
            w_enc, w_dec, b_enc, *moments, last_fired, fire_count, row_step, enc_copy, dec_copy,
            b_pre_grad, grad_square,
        )  # fmt: skip


def sae_gradient_square(
    w_enc: Tensor,
    w_dec: Tensor,
    x: Tensor,
    codes: SaeCodes | Sequence[SaeCodes],
    *,
    b_pre: Tensor | None = None,
    bias: bool = True,
    project: bool = True,
    prefixes: Sequence[int] = (),
    first_feature: int = 0,
    backend: str = "auto",
) -> Tensor:
    """Sum of squares of the gradients `sae_update_` would use, without holding them.

    For exact clipping: clip_scale = min(1, limit / sqrt(total)), where the total may take in the
    squares of gradients that live elsewhere, such as that of b_dec or of other shards.

    Args:
        w_enc: [F, d_in] float32; only its shape counts.
        w_dec: [F, d_out] float32.
        x: [N, d_in] as in `sae_update_`.
        codes: as in `sae_update_`.
        b_pre: [d_in] float32. None = 0.
        bias: count the gradient of b_enc.
        project: as in `sae_update_`.
        prefixes: as in `sae_update_`.
        first_feature: as in `sae_update_`.
        backend: "auto", or one of "reference", "cpu", "cuda" for tests and benches.

    Returns:
        [1] float32.

    Raises:
        TypeError, ValueError, RuntimeError, NotImplementedError: as in `sae_update_`.

    Differentiable in: nothing. Deterministic: yes, for any number of threads.
    Backends: cpu (avx512 / avx2 / baseline), cuda (sm80+), reference.
    """
    groups = _groups("sae_gradient_square", codes)
    args: tuple[Any, ...] = (
        w_enc,
        w_dec,
        x,
        b_pre,
        *groups,
        bias,
        project,
        list(prefixes),
        first_feature,
    )
    _check_square(*args)
    if torch.is_grad_enabled():
        _refuse_gradient("sae_gradient_square", args)
    if backend != "auto":
        _library.require("sae_gradient_square", backend, w_dec.device)
    if backend == "reference" or w_dec.dtype == torch.float64:
        with torch.no_grad():
            return _reference.sae_gradient_square(*args)
    total: Tensor = torch.ops.sidechain.sae_gradient_square.default(*args)
    return total


def _groups(op: str, codes: SaeCodes | Sequence[SaeCodes]) -> tuple[list[Any], ...]:
    """Columns values, indices, offsets, dvalues, error, row_weight over the groups."""
    groups = [codes] if isinstance(codes, SaeCodes) else list(codes)
    for group in groups:
        if not isinstance(group, SaeCodes):
            raise TypeError(f"{op}: expected codes of SaeCodes, got {type(group).__name__}")
    if not groups:
        raise ValueError(f"{op}: expected at least one SaeCodes, got none")
    return (
        [g.values for g in groups],
        [g.indices for g in groups],
        [g.offsets for g in groups],
        [g.dvalues for g in groups],
        [g.error for g in groups],
        [g.row_weight for g in groups],
    )


def _moments(moments: Any) -> SaeMoments:
    if not isinstance(moments, SaeMoments):
        raise TypeError(
            f"sae_update_: expected moments to be SaeMoments, got {type(moments).__name__}"
        )
    return moments


def _written(*tensors: Tensor | None) -> None:
    if not torch.compiler.is_compiling():
        _checks.count_writes(*tensors)


def _refuse_gradient(op: str, args: Sequence[Any]) -> None:
    for t in args:
        if isinstance(t, list):
            _refuse_gradient(op, t)
        elif isinstance(t, Tensor) and t.requires_grad:
            raise NotImplementedError(
                f"{op}: expected tensors that need no gradient [it computes them itself; "
                "sparse_decode is differentiable], got requires_grad=True"
            )


def _check_inputs(
    op: str,
    w_enc: Tensor,
    w_dec: Tensor,
    x: Tensor,
    b_pre: Tensor | None,
    values: list[Tensor],
    indices: list[Tensor],
    offsets: list[Tensor | None],
    dvalues: list[Tensor],
    error: list[Tensor],
    row_weight: list[Tensor | None],
    prefixes: list[int],
    first_feature: int,
) -> Checks:
    c = first_tensor(op, "w_dec", w_dec)
    c.tensor("w_dec", w_dec, SINGLE, ("F", "d_out"), "one row a feature")
    features, d_out = w_dec.shape
    c.tensor("w_enc", w_enc, SINGLE, (features, "d_in"), "F of w_dec")
    c.tensor("x", x, FLOATS, ("N", w_enc.shape[1]), "d_in of w_enc")
    rows = x.shape[0]
    if b_pre is not None:
        c.tensor("b_pre", b_pre, SINGLE, (w_enc.shape[1],), "d_in of w_enc")
    for what, count, most in (
        ("groups of codes", len(values), _GROUPS_MOST),
        ("prefixes", len(prefixes), PREFIXES_MOST),
    ):
        if count > most:
            raise ValueError(f"{op}: expected at most {most} {what}, got {count}")
    if first_feature < 0:
        raise ValueError(f"{op}: expected first_feature >= 0, got {first_feature}")
    if prefixes and (sorted(set(prefixes)) != prefixes or prefixes[-1] < first_feature + features):
        raise ValueError(
            f"{op}: expected ascending prefixes that end at {first_feature + features} or above "
            f"[the last feature], got {prefixes}"
        )
    shape = (len(prefixes), rows, d_out) if prefixes else (rows, d_out)
    for i, v in enumerate(values):
        name = f"codes[{i}]."
        c.codes(v, indices[i], offsets[i], prefix=name, rows=rows)
        c.tensor(f"{name}dvalues", dvalues[i], SINGLE, tuple(v.shape), "that of values")
        c.tensor(f"{name}error", error[i], SINGLE, shape, "N of x, d_out of w_dec")
        weight = row_weight[i]
        if weight is not None:
            c.tensor(f"{name}row_weight", weight, SINGLE, (rows,), "N of x")
    return c


def _check(
    w_enc: Tensor,
    w_dec: Tensor,
    b_enc: Tensor | None,
    enc_mean: Tensor,
    enc_square: Tensor,
    dec_mean: Tensor,
    dec_square: Tensor,
    bias_mean: Tensor | None,
    bias_square: Tensor | None,
    x: Tensor,
    b_pre: Tensor | None,
    values: list[Tensor],
    indices: list[Tensor],
    offsets: list[Tensor | None],
    dvalues: list[Tensor],
    error: list[Tensor],
    row_weight: list[Tensor | None],
    lr: Tensor,
    step: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    unit_norm: bool,
    project: bool,
    clip_scale: Tensor | None,
    prefixes: list[int],
    first_feature: int,
    last_fired: Tensor | None,
    fire_count: Tensor | None,
    row_step: Tensor | None,
    enc_copy: Tensor | None,
    dec_copy: Tensor | None,
    b_pre_grad: Tensor | None,
    grad_square: Tensor | None,
) -> None:
    c = _check_inputs(
        "sae_update_", w_enc, w_dec, x, b_pre, values, indices, offsets, dvalues, error,
        row_weight, prefixes, first_feature,
    )  # fmt: skip
    features, d_in = w_enc.shape
    enc, dec = (features, d_in), tuple(w_dec.shape)
    kinds = DOUBLE if c.wide else (torch.float32, torch.bfloat16)
    c.tensor("moments.enc_mean", enc_mean, kinds, enc, "that of w_enc")
    alike = (enc_mean.dtype,)
    c.tensor("moments.enc_square", enc_square, alike, enc, "that of w_enc")
    c.tensor("moments.dec_mean", dec_mean, alike, dec, "that of w_dec")
    c.tensor("moments.dec_square", dec_square, alike, dec, "that of w_dec")
    written = {
        "w_enc": w_enc, "w_dec": w_dec, "moments.enc_mean": enc_mean,
        "moments.enc_square": enc_square, "moments.dec_mean": dec_mean,
        "moments.dec_square": dec_square, "enc_copy": enc_copy, "dec_copy": dec_copy,
    }  # fmt: skip
    biases = {
        "b_enc": b_enc, "moments.bias_mean": bias_mean, "moments.bias_square": bias_square
    }  # fmt: skip
    for name, t in biases.items():
        if (t is None) != (b_enc is None):
            raise ValueError(
                f"sae_update_: expected {name} to be given exactly when b_enc is, got "
                f"{'None' if t is None else 'a tensor'}"
            )
        if t is not None:
            c.tensor(name, t, SINGLE, (features,), "F of w_dec")
    c.tensor("lr", lr, SINGLE, (1,), "one number")
    c.tensor("step", step, INT64, (1,), "one number")
    if clip_scale is not None:
        c.tensor("clip_scale", clip_scale, SINGLE, (1,), "one number")
    for name, t in (
        ("last_fired", last_fired), ("fire_count", fire_count), ("row_step", row_step)
    ):  # fmt: skip
        if t is not None:
            c.tensor(name, t, INT64, (features,), "F of w_dec")
    if enc_copy is not None:
        c.tensor("enc_copy", enc_copy, _COPIES, enc, "that of w_enc")
    if dec_copy is not None:
        c.tensor("dec_copy", dec_copy, _COPIES, dec, "that of w_dec")
    if b_pre_grad is not None:
        c.tensor("b_pre_grad", b_pre_grad, SINGLE, (d_in,), "d_in of w_enc")
    if grad_square is not None:
        c.tensor("grad_square", grad_square, SINGLE, (1,), "one number")
    for name, t in written.items():
        if t is not None:
            c.contiguous(name, t)
    for name, value, top in (
        ("betas[0]", beta1, 1.0), ("betas[1]", beta2, 1.0), ("eps", eps, float("inf")),
        ("weight_decay", weight_decay, float("inf")),
    ):  # fmt: skip
        if not 0.0 <= value < top:
            raise ValueError(f"sae_update_: expected 0 <= {name} < {top:g}, got {value}")


def _check_square(
    w_enc: Tensor,
    w_dec: Tensor,
    x: Tensor,
    b_pre: Tensor | None,
    values: list[Tensor],
    indices: list[Tensor],
    offsets: list[Tensor | None],
    dvalues: list[Tensor],
    error: list[Tensor],
    row_weight: list[Tensor | None],
    bias: bool,
    project: bool,
    prefixes: list[int],
    first_feature: int,
) -> None:
    _check_inputs(
        "sae_gradient_square", w_enc, w_dec, x, b_pre, values, indices, offsets, dvalues, error,
        row_weight, prefixes, first_feature,
    )  # fmt: skip


def _fake_square(w_enc: Tensor, w_dec: Tensor, *args: Any) -> Tensor:
    _check_square(w_enc, w_dec, *args)
    return w_dec.new_empty(1)


_WITHOUT = {"triton": "bound by the memory traffic of Adam: the CUDA C++ kernel covers the GPU"}
_GROUPS = (
    "Tensor[] values, Tensor[] indices, Tensor?[] offsets, Tensor[] dvalues, Tensor[] error, "
    "Tensor?[] row_weight"
)
_library.define(
    "sae_update_(Tensor(a!) w_enc, Tensor(b!) w_dec, Tensor(c!)? b_enc, Tensor(d!) enc_mean, "
    "Tensor(e!) enc_square, Tensor(f!) dec_mean, Tensor(g!) dec_square, Tensor(h!)? bias_mean, "
    f"Tensor(i!)? bias_square, Tensor x, Tensor? b_pre, {_GROUPS}, Tensor lr, Tensor step, "
    "float beta1, float beta2, float eps, float weight_decay, bool unit_norm, bool project, "
    "Tensor? clip_scale, int[] prefixes, int first_feature, Tensor(j!)? last_fired, "
    "Tensor(k!)? fire_count, Tensor(l!)? row_step, Tensor(m!)? enc_copy, Tensor(n!)? dec_copy, "
    "Tensor(o!)? b_pre_grad, Tensor(p!)? grad_square) -> ()",
    reference=_reference.sae_update_,
    fake=_check,
    without=_WITHOUT,
)
_library.define(
    f"sae_gradient_square(Tensor w_enc, Tensor w_dec, Tensor x, Tensor? b_pre, {_GROUPS}, "
    "bool bias, bool project, int[] prefixes, int first_feature) -> Tensor",
    reference=_reference.sae_gradient_square,
    fake=_fake_square,
    without=_WITHOUT,
)
for _op in ("sae_update_", "sae_gradient_square"):
    # The public functions refuse gradients; below them autograd has nothing to do.
    _library.library.impl(_op, torch.library.fallthrough_kernel, "Autograd")
