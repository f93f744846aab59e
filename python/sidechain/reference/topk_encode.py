# SPDX-License-Identifier: Apache-2.0
"""Reference of ``topk_encode``: the dense encoder, then a stable sort, a global one or a threshold.

Holds [N, F], which the kernels never do. Source: TopK of Gao et al. 2024 (arXiv:2406.04093, eq. 3),
BatchTopK of Bussmann et al. 2024 (arXiv:2412.06410), JumpReLU of Rajamanoharan et al. 2024
(arXiv:2407.14435).
"""

from __future__ import annotations

import torch
from torch import Tensor


def activations(
    x: Tensor,
    w_enc: Tensor,
    b_enc: Tensor | None = None,
    b_pre: Tensor | None = None,
    *,
    bf16: bool = False,
) -> Tensor:
    """Return relu(w_enc (x - b_pre) + b_enc) [N, F], float32 (float64 where x is float64).

    Args:
        x: [N, d], any float dtype.
        w_enc: [F, d], any float dtype.
        b_enc: [F], any float dtype. None = 0.
        b_pre: [d], any float dtype, subtracted in the dtype of the result. None = 0.
        bf16: round x - b_pre and w_enc to bfloat16 first.

    Differentiable in every tensor; rounding passes gradients through.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    centred = x.to(dtype)
    if b_pre is not None:
        centred = centred - b_pre.to(dtype)
    w = w_enc.to(dtype)
    if bf16:
        centred, w = _rounded(centred), _rounded(w)
    z = centred @ w.mT
    if b_enc is not None:
        z = z + b_enc.to(dtype)
    return z.relu()


def topk_encode(
    x: Tensor,
    w_enc: Tensor,
    b_enc: Tensor | None,
    b_pre: Tensor | None,
    k: int,
    *,
    bf16: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the k largest activations of every row: values [N, k] and indices [N, k] int32.

    Sorted by value descending, ties by index ascending; NaN is larger than every number. A slot
    without an active feature holds 0 and -1. Arguments as in `activations`.

    Differentiable in: x, w_enc, b_enc, b_pre.
    """
    z = activations(x, w_enc, b_enc, b_pre, bf16=bf16)
    values, indices = z.sort(dim=-1, descending=True, stable=True)
    values, indices = values[:, :k], indices[:, :k]
    return values, torch.where(values == 0, -1, indices).int()


def topk_encode_ragged(
    x: Tensor,
    w_enc: Tensor,
    b_enc: Tensor | None,
    b_pre: Tensor | None,
    k: int,
    threshold: Tensor | None,
    *,
    bf16: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return values [nnz], indices [nnz] int32 (ascending within a row) and offsets [N + 1] int64.

    Without a threshold the N * k largest activations of the whole batch are kept (ties: lowest
    row-major position; zeros never); with one, [1] or [F], those above it, and every NaN.
    Other arguments as in `activations`.

    Differentiable in: x, w_enc, b_enc, b_pre.
    """
    z = activations(x, w_enc, b_enc, b_pre, bf16=bf16)
    rows, features = z.shape
    flat = z.flatten()
    if threshold is None:
        order = flat.sort(descending=True, stable=True).indices[: rows * k]
        chosen = torch.zeros_like(flat, dtype=torch.bool).index_fill(0, order, True) & (flat != 0)
    else:
        # Written so that NaN stays; relu's zeros never count, even below a negative threshold.
        chosen = ~(z <= threshold.to(z.dtype).clamp(min=0)).flatten()
    where = chosen.nonzero().squeeze(1)
    per_row = chosen.view(rows, features).sum(1)
    offsets = torch.cat([per_row.new_zeros(1), per_row.cumsum(0)])
    return flat[where], (where % max(features, 1)).int(), offsets


def topk_encode_backward(
    grad: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    x: Tensor,
    w_enc: Tensor,
    b_pre: Tensor | None,
    *,
    bf16: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x [N, d], w_enc [F, d] and b_enc [F] as the dense encoder has them.

    The gradient of b_pre is minus the sum of the first over its rows. With dz [N, F] zero but at
    the codes: dx = dz w_enc, dw_enc = dz^T (x - b_pre), db_enc = sum_n dz.

    Args:
        grad: of the values, [N, k] or [nnz].
        indices: like `grad`, int32; -1 is skipped.
        offsets: [N + 1] int64, or None for the fixed form.
        x: as in `activations`.
        w_enc: as in `activations`.
        b_pre: as in `activations`.
        bf16: whether the forward rounded its operands to bfloat16.

    Accumulates in float32 (float64 where x is float64).
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = torch.arange(x.shape[0], device=x.device)
    if offsets is None:
        rows = rows[:, None].expand(indices.shape)
    else:
        rows = rows.repeat_interleave(offsets.diff(), output_size=indices.shape[0])
    active = indices >= 0
    dz = torch.zeros(x.shape[0], w_enc.shape[0], dtype=dtype, device=x.device)
    at = (rows.flatten(), indices.flatten().clamp(min=0).long())
    dz.index_put_(at, torch.where(active, grad.to(dtype), 0.0).flatten(), accumulate=True)
    centred = x.to(dtype)
    if b_pre is not None:
        centred = centred - b_pre.to(dtype)
    w = w_enc.to(dtype)
    if bf16:
        centred, w = _rounded(centred), _rounded(w)
    return dz @ w, dz.mT @ centred, dz.sum(0)


def _rounded(t: Tensor) -> Tensor:
    """Rounded to bfloat16 precision; the gradient passes unrounded."""
    change = t.detach().to(torch.bfloat16).to(t.dtype) - t.detach()
    return t + torch.where(t.isfinite(), change, 0.0)  # an infinity less itself would be NaN
