# SPDX-License-Identifier: Apache-2.0
"""``sae_update_``: gradients, projection, Adam and unit norm of an autoencoder, row by row."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..reference import sae_update as _reference
from . import _checks, _library
from ._code_checks import DOUBLE, FLOATS, INT64, SINGLE, Checks, first_tensor
from .sae_structs import (
    GROUPS_SCHEMA,
    AdamOptions,
    AdamState,
    CodeGroup,
    GradientInputs,
    SaeWeights,
    square_structs,
    to_schema,
    update_structs,
)

# kMaxCodeGroups and kMaxPrefixes of csrc/include/sidechain/sae_update.h
_GROUPS_MOST = 4
PREFIXES_MOST = 16


def sae_update_(
    weights: SaeWeights,
    state: AdamState,
    inputs: GradientInputs,
    adam: AdamOptions,
    *,
    unit_norm: bool = True,
    last_fired: Tensor | None = None,
    b_pre_grad: Tensor | None = None,
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

    A bfloat16 state is rounded stochastically by bits that are a function of step, feature and
    column alone (`sidechain.reference.sae_update.rounding_noise`).

    Args:
        weights: `SaeWeights`. Written, but for b_pre.
        state: `AdamState`. Written.
        inputs: `GradientInputs`; the last dim of x is contiguous.
        adam: `AdamOptions`. `sae_gradient_square` before the call gives what an exact clip_scale
            is made of.
        unit_norm: scale the decoder rows to norm 1 after the step.
        last_fired: [F] int64, set to step where the first group has an entry.
        b_pre_grad: [d_in] float32, receives -sum_f g_b[f] w_enc[f] (old w_enc, not clipped).
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
    op = "sae_update_"
    _check_kinds(op, weights=(weights, SaeWeights), inputs=(inputs, GradientInputs))
    _check_kinds(op, state=(state, AdamState), adam=(adam, AdamOptions))
    inputs = _listed(op, inputs)
    call = (weights, state, inputs, adam, unit_norm, last_fired, b_pre_grad)
    _check(*call)
    args = to_schema(*call)
    _prepare(op, args, backend, weights.w_dec)
    if backend == "reference" or weights.w_dec.dtype == torch.float64:
        with torch.no_grad():
            _reference.sae_update_(*call)
    else:
        torch.ops.sidechain.sae_update_.default(*args)
        if not torch.compiler.is_compiling():
            _checks.count_writes(*weights[:3], *state, last_fired, b_pre_grad)


def sae_gradient_square(
    weights: SaeWeights, inputs: GradientInputs, *, backend: str = "auto"
) -> Tensor:
    """Sum of squares of the gradients `sae_update_` would use, without holding them.

    For exact clipping: clip_scale = min(1, limit / sqrt(total)), where the total may take in the
    squares of gradients that live elsewhere, such as that of b_dec or of other shards.

    Args:
        weights: as in `sae_update_`; of w_enc the shape counts, and of b_enc whether it is there.
        inputs: as in `sae_update_`.
        backend: "auto", or one of "reference", "cpu", "cuda" for tests and benches.

    Returns:
        [1] float32.

    Raises:
        TypeError, ValueError, RuntimeError, NotImplementedError: as in `sae_update_`.

    Differentiable in: nothing. Deterministic: yes, for any number of threads.
    Backends: cpu (avx512 / avx2 / baseline), cuda (sm80+), reference.
    """
    op = "sae_gradient_square"
    _check_kinds(op, weights=(weights, SaeWeights), inputs=(inputs, GradientInputs))
    inputs = _listed(op, inputs)
    _check_inputs(op, weights, inputs)
    args = to_schema(weights, inputs)
    _prepare(op, args, backend, weights.w_dec)
    if backend == "reference" or weights.w_dec.dtype == torch.float64:
        with torch.no_grad():
            return _reference.sae_gradient_square(weights, inputs)
    total: Tensor = torch.ops.sidechain.sae_gradient_square.default(*args)
    return total


def _check_kinds(op: str, **given: tuple[object, type]) -> None:
    for name, (value, kind) in given.items():
        if not isinstance(value, kind):
            raise TypeError(
                f"{op}: expected {name} to be {kind.__name__}, got {type(value).__name__}"
            )


def _listed(op: str, inputs: GradientInputs) -> GradientInputs:
    """Return the inputs with a list of groups and one of prefixes."""
    groups = list(inputs.codes)
    for group in groups:
        _check_kinds(op, codes=(group, CodeGroup))
    if not groups:
        raise ValueError(f"{op}: expected at least one CodeGroup, got none")
    return inputs._replace(codes=groups, prefixes=list(inputs.prefixes))


def _prepare(op: str, args: Iterable[Any], backend: str, w_dec: Tensor) -> None:
    """Refuse gradients and a backend that cannot run here."""
    if torch.is_grad_enabled():
        _refuse_gradient(op, args)
    if backend != "auto":
        _library.require(op, backend, w_dec.device)


def _refuse_gradient(op: str, args: Iterable[Any]) -> None:
    for t in args:
        if isinstance(t, list):
            _refuse_gradient(op, t)
        elif isinstance(t, Tensor) and t.requires_grad:
            raise NotImplementedError(
                f"{op}: expected tensors that need no gradient [it computes them itself; "
                "sparse_decode is differentiable], got requires_grad=True"
            )


def _check_inputs(op: str, weights: SaeWeights, inputs: GradientInputs) -> Checks:
    w_enc, w_dec = weights.w_enc, weights.w_dec
    c = first_tensor(op, "w_dec", w_dec)
    c.tensor("w_dec", w_dec, SINGLE, ("F", "d_out"), "one row a feature")
    features, d_out = w_dec.shape
    c.tensor("w_enc", w_enc, SINGLE, (features, "d_in"), "F of w_dec")
    c.tensor("x", inputs.x, FLOATS, ("N", w_enc.shape[1]), "d_in of w_enc")
    rows = inputs.x.shape[0]
    if weights.b_pre is not None:
        c.tensor("b_pre", weights.b_pre, SINGLE, (w_enc.shape[1],), "d_in of w_enc")
    prefixes, last = list(inputs.prefixes), inputs.first_feature + features
    for what, count, most in (
        ("groups of codes", len(inputs.codes), _GROUPS_MOST),
        ("prefixes", len(prefixes), PREFIXES_MOST),
    ):
        if count > most:
            raise ValueError(f"{op}: expected at most {most} {what}, got {count}")
    if inputs.first_feature < 0:
        raise ValueError(f"{op}: expected first_feature >= 0, got {inputs.first_feature}")
    if prefixes and (sorted(set(prefixes)) != prefixes or prefixes[-1] < last):
        raise ValueError(
            f"{op}: expected ascending prefixes that end at {last} or above "
            f"[the last feature], got {prefixes}"
        )
    shape = (len(prefixes), rows, d_out) if prefixes else (rows, d_out)
    for i, group in enumerate(inputs.codes):
        name, values = f"codes[{i}].", group.values
        c.codes(values, group.indices, group.offsets, prefix=name, rows=rows)
        c.tensor(f"{name}dvalues", group.dvalues, SINGLE, tuple(values.shape), "that of values")
        c.tensor(f"{name}error", group.error, SINGLE, shape, "N of x, d_out of w_dec")
        if group.row_weight is not None:
            c.tensor(f"{name}row_weight", group.row_weight, SINGLE, (rows,), "N of x")
    return c


def _check(
    weights: SaeWeights,
    state: AdamState,
    inputs: GradientInputs,
    adam: AdamOptions,
    unit_norm: bool,
    last_fired: Tensor | None,
    b_pre_grad: Tensor | None,
) -> None:
    c = _check_inputs("sae_update_", weights, inputs)
    features, d_in = weights.w_enc.shape
    _check_state(c, weights, state)
    c.tensor("lr", adam.lr, SINGLE, (1,), "one number")
    c.tensor("step", adam.step, INT64, (1,), "one number")
    if adam.clip_scale is not None:
        c.tensor("clip_scale", adam.clip_scale, SINGLE, (1,), "one number")
    if last_fired is not None:
        c.tensor("last_fired", last_fired, INT64, (features,), "F of w_dec")
    if b_pre_grad is not None:
        c.tensor("b_pre_grad", b_pre_grad, SINGLE, (d_in,), "d_in of w_enc")
    for name, top in (
        ("beta1", 1.0),
        ("beta2", 1.0),
        ("eps", torch.inf),
        ("weight_decay", torch.inf),
    ):
        value = getattr(adam, name)
        if not 0.0 <= value < top:
            raise ValueError(f"sae_update_: expected 0 <= {name} < {top:g}, got {value}")


def _check_state(c: Checks, weights: SaeWeights, state: AdamState) -> None:
    dtypes = DOUBLE if c.wide else (torch.float32, torch.bfloat16)
    for kind, weight in (("enc", weights.w_enc), ("dec", weights.w_dec)):
        c.contiguous(f"w_{kind}", weight)
        for name in (f"{kind}_mean", f"{kind}_square"):
            t, shape = getattr(state, name), tuple(weight.shape)
            c.tensor(f"state.{name}", t, dtypes, shape, f"that of w_{kind}")
            c.contiguous(f"state.{name}", t)
            dtypes = (t.dtype,)
    for name, t in (
        ("b_enc", weights.b_enc),
        ("state.bias_mean", state.bias_mean),
        ("state.bias_square", state.bias_square),
    ):
        if (t is None) != (weights.b_enc is None):
            raise ValueError(
                f"{c.op}: expected {name} to be given exactly when b_enc is, got "
                f"{'None' if t is None else 'a tensor'}"
            )
        if t is not None:
            c.tensor(name, t, SINGLE, (weights.w_dec.shape[0],), "F of w_dec")


def _reference_update(*args: Any) -> None:
    _reference.sae_update_(*update_structs(args))


def _fake_update(*args: Any) -> None:
    _check(*update_structs(args))


def _reference_square(*args: Any) -> Tensor:
    return _reference.sae_gradient_square(*square_structs(args))


def _fake_square(*args: Any) -> Tensor:
    weights, inputs = square_structs(args)
    _check_inputs("sae_gradient_square", weights, inputs)
    return weights.w_dec.new_empty(1)


_WITHOUT = {"triton": "bound by the memory traffic of Adam: the CUDA C++ kernel covers the GPU"}
_library.define(
    "sae_update_(Tensor(a!) w_enc, Tensor(b!) w_dec, Tensor(c!)? b_enc, Tensor? b_pre, "
    "Tensor(d!) enc_mean, Tensor(e!) enc_square, Tensor(f!) dec_mean, Tensor(g!) dec_square, "
    f"Tensor(h!)? bias_mean, Tensor(i!)? bias_square, Tensor x, {GROUPS_SCHEMA}, bool project, "
    "int[] prefixes, int first_feature, Tensor lr, Tensor step, float beta1, float beta2, "
    "float eps, float weight_decay, Tensor? clip_scale, bool unit_norm, Tensor(j!)? last_fired, "
    "Tensor(k!)? b_pre_grad) -> ()",
    reference=_reference_update,
    fake=_fake_update,
    without=_WITHOUT,
)
_library.define(
    "sae_gradient_square(Tensor w_enc, Tensor w_dec, Tensor? b_enc, Tensor? b_pre, Tensor x, "
    f"{GROUPS_SCHEMA}, bool project, int[] prefixes, int first_feature) -> Tensor",
    reference=_reference_square,
    fake=_fake_square,
    without=_WITHOUT,
)
for _op in ("sae_update_", "sae_gradient_square"):
    # The public functions refuse gradients; below them autograd has nothing to do.
    _library.library.impl(_op, torch.library.fallthrough_kernel, "Autograd")
