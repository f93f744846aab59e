# SPDX-License-Identifier: Apache-2.0
"""``sae_edit_``: steer activations by editing features of a sparse autoencoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference import sae_edit as _reference
from . import _checks, _library
from ._code_checks import BOOL, FLOATS, INT32, INT64, SINGLE, first_tensor
from .sae_structs import CodeEdit, edit_structs, to_schema


def sae_edit_(
    x: Tensor,
    edit: CodeEdit,
    w_dec: Tensor,
    *,
    strength: Tensor | None = None,
    mask: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Move activations by the change of a few features, in place.

    x[n] += strength[n] sum_j (values_new[n, j] - values_old[n, j]) w_dec[indices[n, j]], rounded
    once. Nothing else of x changes, so what the autoencoder does not reconstruct survives. Adding
    features needs no encode at all (values_old = None), removing them only the old values
    (values_new = None). A row whose changes are all 0, whose strength is 0 or that the mask leaves
    out is not written: it stays bit-identical. The edit is data: values, strength and mask are
    tensors on the device of x, and changing them waits for nothing.

    Args:
        x: activations [N, d], float32 | float16 | bfloat16, last dim contiguous. Written.
        edit: `CodeEdit`; its tensors may be expanded over the rows (`t[None].expand(N, K)`).
        w_dec: [F, d], float32 | float16 | bfloat16, last dim contiguous.
        strength: [N] or [1] float32. None = 1.
        mask: rows to edit [N] bool. None = all.
        backend: "auto", or one of "reference", "cpu", "cuda" for tests and benches.

    Returns:
        x itself.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: a shape does not fit.
        RuntimeError: tensors on different devices, or the backend cannot run here.
        NotImplementedError: a gradient is asked for.

    Differentiable in: nothing; `sidechain.reference.sae_edit.sae_edit` is the differentiable form.
    Accumulates in float32. Deterministic: yes, for any number of threads. float64 is served by the
    reference. Backends: cpu (avx512 / avx2 / baseline), cuda (sm80+), reference.
    Source: Templeton et al. 2024 (feature clamping), as a low-rank change.
    """
    if not isinstance(edit, CodeEdit):
        raise TypeError(f"sae_edit_: expected edit to be CodeEdit, got {type(edit).__name__}")
    call = (x, edit, w_dec, strength, mask)
    _check(*call)
    if torch.is_grad_enabled():
        for t in (x, edit.values_old, edit.values_new, w_dec, strength):
            if t is not None and t.requires_grad:
                raise NotImplementedError(
                    "sae_edit_: expected tensors that need no gradient [it writes in place; "
                    "sidechain.reference.sae_edit.sae_edit is differentiable], "
                    "got requires_grad=True"
                )
    if backend != "auto":
        _library.require("sae_edit_", backend, x.device)
    if backend == "reference" or x.dtype == torch.float64:
        _reference.sae_edit_(*call)
    else:
        torch.ops.sidechain.sae_edit_.default(*to_schema(*call))
        if not torch.compiler.is_compiling():
            _checks.count_writes(x)
    return x


def _check(
    x: Tensor, edit: CodeEdit, w_dec: Tensor, strength: Tensor | None, mask: Tensor | None
) -> None:
    indices, offsets = edit.indices, edit.offsets
    c = first_tensor("sae_edit_", "x", x)
    c.tensor("x", x, FLOATS, ("N", "d"), "activations")
    if x.shape[0] > 1 and x.stride(0) == 0:
        raise ValueError("sae_edit_: expected x without repeated (expanded) rows, got stride 0")
    rows, width = x.shape
    c.tensor("w_dec", w_dec, FLOATS, ("F", width), "d of x")
    shape: tuple[int | str, ...] = (rows, "K") if offsets is None else ("nnz",)
    c.tensor("indices", indices, INT32, shape, "N of x" if offsets is None else "CSR")
    for name, t in (("values_old", edit.values_old), ("values_new", edit.values_new)):
        if t is not None:
            c.tensor(name, t, SINGLE, tuple(indices.shape), "that of indices")
    if edit.values_old is None and edit.values_new is None:
        raise ValueError("sae_edit_: expected values_old or values_new, got neither")
    if offsets is not None:
        c.tensor("offsets", offsets, INT64, (rows + 1,), "N of x")
    if strength is not None:
        single = isinstance(strength, Tensor) and strength.shape == (1,)
        c.tensor("strength", strength, SINGLE, (1 if single else rows,), "1 or N of x")
    if mask is not None:
        c.tensor("mask", mask, BOOL, (rows,), "N of x")


def _checked_reference(*args: Any) -> None:
    call = edit_structs(args)
    _check(*call)
    _reference.sae_edit_(*call)


def _fake(*args: Any) -> None:
    _check(*edit_structs(args))


_library.define(
    "sae_edit_(Tensor(a!) x, Tensor? values_old, Tensor? values_new, Tensor indices, "
    "Tensor? offsets, Tensor w_dec, Tensor? strength, Tensor? mask) -> ()",
    reference=_checked_reference,
    fake=_fake,
    without={"triton": "gathers are memory-bound: the CUDA C++ kernel covers the GPU"},
)
# The public function refuses gradients; below it autograd has nothing to do.
_library.library.impl("sae_edit_", torch.library.fallthrough_kernel, "Autograd")
