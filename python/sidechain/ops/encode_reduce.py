# SPDX-License-Identifier: Apache-2.0
"""``encode_reduce``: sums, sums of squares and firing counts of encoded features for each label."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference import encode_reduce as _reference
from . import _checks, _library
from ._code_checks import INT64, SINGLE, first_tensor
from .encoder_structs import Encoder
from .topk_encode import topk_encode


class CodeSums(NamedTuple):
    """Sums over the rows of each of G labels; divide by `rows` for means."""

    sums: Tensor  # [G, F] float32
    squares: Tensor  # [G, F] float32
    counts: Tensor  # [G, F] int64, rows in which the feature is active
    rows: Tensor  # [G] int64, rows seen

    @classmethod
    def zeros(
        cls,
        labels: int,
        features: int,
        device: Any = None,
        dtype: torch.dtype = torch.float32,
    ) -> CodeSums:
        """Return empty sums."""
        shape = (labels, features)
        return cls(
            torch.zeros(shape, device=device, dtype=dtype),
            torch.zeros(shape, device=device, dtype=dtype),
            torch.zeros(shape, dtype=torch.int64, device=device),
            torch.zeros(labels, dtype=torch.int64, device=device),
        )


def encode_reduce(
    x: Tensor,
    encoder: Encoder,
    *,
    k: int | None = None,
    threshold: float | Tensor | None = None,
    label: Tensor | None = None,
    out: CodeSums | None = None,
    precision: str = "fp32",
    backend: str = "auto",
) -> CodeSums:
    """Encode activations and keep only sums over the rows of each label.

    The codes are those of `topk_encode`, with k or with a threshold (0: every positive feature);
    they are added up by `code_sums_` and forgotten, so no [N, F] array ever exists. Calls add to
    `out`, which makes one pass over a generation enough to score features by step or by concept.

    Args:
        x: activations [N, d], float32 | float16 | bfloat16.
        encoder: weights, dtype of x.
        k: features kept of every row; or
        threshold: a number or [F], features above it are kept.
        label: [N] int64; rows of labels that `out` does not have are left out. None = 0.
        out: sums to add to. None = new ones of one label.
        precision: "fp32" | "bf16" | "int8", as in `topk_encode`.
        backend: as in `topk_encode`; what encodes in Triton is added up by `code_sums_` of its
            own choice.

    Returns:
        out, or new `CodeSums` of one label and F features.

    Raises:
        TypeError, ValueError, RuntimeError: as in `topk_encode` and `code_sums_`.
        ValueError: both or neither of k and threshold are given, or a label without `out`.

    Differentiable in: nothing. Deterministic: yes, for any number of threads.
    Backends: those of `topk_encode`. Source: the sums that TADA's feature scores are made of
    (arXiv:2602.11910).
    """
    if (k is None) == (threshold is None):
        got = "neither" if k is None else "both"
        raise ValueError(f"encode_reduce: expected either k or threshold, got {got}")
    if label is not None and out is None:
        raise ValueError("encode_reduce: expected out beside label [it says how many], got None")
    with torch.no_grad():
        codes = topk_encode(
            x, encoder, k=k, mode="threshold" if k is None else "topk",
            threshold=threshold, precision=precision, backend=backend,
        )  # fmt: skip
        if out is None:
            out = CodeSums.zeros(1, encoder.w_enc.shape[0], x.device, codes.values.dtype)
        # One GPU backend encodes, another adds up.
        adds = "auto" if backend == "triton" else backend
        return code_sums_(
            out, codes.values, codes.indices, offsets=codes.offsets, label=label, backend=adds
        )


def code_sums_(
    out: CodeSums,
    values: Tensor,
    indices: Tensor,
    *,
    offsets: Tensor | None = None,
    label: Tensor | None = None,
    backend: str = "auto",
) -> CodeSums:
    """Add sparse codes to the sums of their labels, in place.

    With g = label[n]: rows[g] += 1, and for every entry with v = values[n, j] not 0 and
    f = indices[n, j]: sums[g, f] += v; squares[g, f] += v^2; counts[g, f] += 1.
    Entries of other indices and rows of other labels stand for nothing.

    Args:
        out: `CodeSums` of G labels and F features, contiguous. Written.
        values: [N, K] float32, or [nnz] with offsets.
        indices: int32, shape of values, without duplicates within a row.
        offsets: row starts [N + 1] int64 of codes in CSR form. None = fixed width.
        label: [N] int64. None = 0.
        backend: "auto", or one of "reference", "cpu", "cuda" for tests and benches.

    Returns:
        out itself.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: a shape does not fit.
        RuntimeError: tensors on different devices, or the backend cannot run here.

    Differentiable in: nothing. Entries are added in the dtype of the sums, by the CPU in row order,
    by CUDA in pieces of their sorted list, added up in order. Deterministic: bit for bit, for any
    number of threads. float64 is served by the reference. cuda: fewer than 2^31 sums.
    Backends: cpu (avx512 / avx2 / baseline), cuda (sm80+), reference.
    """
    if not isinstance(out, CodeSums):
        raise TypeError(f"code_sums_: expected out to be CodeSums, got {type(out).__name__}")
    args = (values, indices, offsets, label, *out)
    _check(*args)
    if backend != "auto":
        _library.require("code_sums_", backend, out.sums.device)
    with torch.no_grad():
        if backend == "reference" or out.sums.dtype == torch.float64:
            _reference.code_sums_(*args)
        else:
            torch.ops.sidechain.code_sums_.default(*args)
            if not torch.compiler.is_compiling():
                _checks.count_writes(*out)
    return out


def _check(
    values: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    label: Tensor | None,
    sums: Tensor,
    squares: Tensor,
    counts: Tensor,
    rows: Tensor,
) -> None:
    c = first_tensor("code_sums_", "out.sums", sums)
    c.tensor("out.sums", sums, SINGLE, ("G", "F"), "labels, features")
    shape = tuple(sums.shape)
    c.tensor("out.squares", squares, SINGLE, shape, "that of out.sums")
    c.tensor("out.counts", counts, INT64, shape, "that of out.sums")
    c.tensor("out.rows", rows, INT64, shape[:1], "G of out.sums")
    for name, t in (("sums", sums), ("squares", squares), ("counts", counts), ("rows", rows)):
        c.contiguous(f"out.{name}", t)
    n = c.codes(values, indices, offsets)
    if label is not None:
        c.tensor("label", label, INT64, (n,), "N of the codes")


_library.define(
    "code_sums_(Tensor values, Tensor indices, Tensor? offsets, Tensor? label, "
    "Tensor(a!) sums, Tensor(b!) squares, Tensor(c!) counts, Tensor(d!) rows) -> ()",
    reference=_reference.code_sums_,
    fake=_check,
    without={"triton": "a scatter of few entries: the CUDA C++ kernel covers the GPU"},
)
# Counting is no function of which a gradient makes sense.
_library.library.impl("code_sums_", torch.library.fallthrough_kernel, "Autograd")
