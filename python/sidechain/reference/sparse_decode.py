# SPDX-License-Identifier: Apache-2.0
"""Reference of ``sparse_decode``: the decoder of a sparse autoencoder on sparse codes.

Source: Bricken et al. 2023 (decoder and loss); Gao et al. 2024, arXiv 2406.04093 (sparse form).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .codes import accumulator, add_scaled_rows, code_rows, dot_rows, entries


def sparse_decode(
    values: Tensor,
    indices: Tensor,
    w_dec: Tensor,
    b_dec: Tensor | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    """Return x_hat[n] = b_dec + sum_j values[n, j] w_dec[indices[n, j]], [N, d].

    Shapes as in `sidechain.ops.sparse_decode`. Differentiable in values, w_dec and b_dec.
    """
    n, acc = code_rows(values, offsets), accumulator(values, w_dec)
    e = entries(values, indices, offsets, w_dec.shape[0])
    out = torch.zeros(n, w_dec.shape[1], dtype=acc, device=w_dec.device)
    out = add_scaled_rows(out, e.row, e.value, e.valid, w_dec, e.feature)
    return out if b_dec is None else out + b_dec


def sparse_decode_backward(
    grad: Tensor,
    values: Tensor,
    indices: Tensor,
    w_dec: Tensor,
    offsets: Tensor | None,
    need_values: bool,
    need_table: bool,
) -> tuple[Tensor, Tensor]:
    """Return d values (shape of values) and d w_dec [F, d]; an empty tensor where not needed."""
    e = entries(values, indices, offsets, w_dec.shape[0])
    dvalues, dtable = values.new_empty(0), w_dec.new_empty(0)
    if need_values:
        dvalues = dot_rows(grad, e.row, w_dec, e.feature, e.valid).view_as(values)
    if need_table:
        total = torch.zeros(w_dec.shape, dtype=grad.dtype, device=grad.device)
        total = add_scaled_rows(total, e.feature, e.value, e.valid, grad, e.row)
        dtable = total.to(w_dec.dtype)
    return dvalues, dtable


def sparse_decode_loss(
    values: Tensor,
    indices: Tensor,
    w_dec: Tensor,
    b_dec: Tensor | None,
    target: Tensor,
    offsets: Tensor | None = None,
    row_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return error [N, d], squared error [N] and d values of the weighted loss.

    error = x_hat - target; loss[n] = |error[n]|^2;
    dvalues[n, j] = row_weight[n] <error[n], w_dec[indices[n, j]]>, which is the gradient of
    sum_n row_weight[n] loss[n] / 2; 0 where the index stands for nothing.
    """
    x_hat = sparse_decode(values, indices, w_dec, b_dec, offsets)
    error = x_hat - target.to(x_hat.dtype)
    e = entries(values, indices, offsets, w_dec.shape[0])
    dvalues = dot_rows(error, e.row, w_dec, e.feature, e.valid)
    if row_weight is not None and error.shape[0] > 0:
        dvalues = dvalues * row_weight.index_select(0, e.row)
    return error, error.square().sum(-1), dvalues.view_as(values)
