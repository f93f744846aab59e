# SPDX-License-Identifier: Apache-2.0
"""``topk_encode_backward``: gradients of a sparse encoder, gathered instead of scattered.

dx is a sum of dictionary rows for each row of x; dw and db are sums of rows of x for each feature,
after the codes were sorted by feature. Sums run in float32 in an order that follows from the codes,
without atomics. Nothing waits for the host. Moved: d elements a code, twice; bound by that.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

import triton

from ._launch import launch, on_device
from ._topk_rows import load_centred, operands

GATHERED = 16  # rows gathered at a time
WIDEST = 256  # elements of a row that a program sums


@triton.jit
def _add_rows(
    total, p_rows, stride, p_minus, row, scale, live, c, D, BF16: tl.constexpr,
):  # fmt: skip
    """Add a sum of scaled rows to total [BLOCK]."""
    p_row = p_rows + row.to(tl.int64)[:, None] * stride
    v = load_centred(p_row, p_minus, c[None, :], live[:, None], D, BF16)
    # A row that stands for nothing may be NaN.
    return total + tl.sum(tl.where(live[:, None], scale[:, None] * v, 0.0), 0)


@triton.jit(do_not_specialize=["F", "K"])
def input_kernel(
    p_dx,  # [N, D]
    p_grad,  # [N, K] or [nnz]
    p_indices,
    p_offsets,  # [N + 1] or None
    p_w,
    w_stride,
    D,
    F,
    K,
    BF16: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum BLOCK elements of dx of one row."""
    n = tl.program_id(0).to(tl.int64)
    begin = n * K
    end = begin + K
    if p_offsets is not None:
        begin = tl.load(p_offsets + n)
        end = tl.load(p_offsets + n + 1)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for j0 in range(begin, end, ROWS):
        j = j0 + tl.arange(0, ROWS)
        f = tl.load(p_indices + j, mask=j < end, other=-1)
        live = (f >= 0) & (f < F)
        g = tl.load(p_grad + j, mask=live, other=0.0)
        total = _add_rows(total, p_w, w_stride, None, tl.where(live, f, 0), g, live, c, D, BF16)
    tl.store(p_dx + n * D + c, total, mask=c < D)


@triton.jit
def weight_kernel(
    p_dw,  # [F, D] or None
    p_db,  # [F]
    p_grad,  # [codes]
    p_codes,  # [codes]: numbers of the codes, sorted by feature
    p_rows,  # [codes]: row of every code
    p_start,  # [F + 1]: where the codes of a feature start in p_codes
    p_x,
    x_stride,
    p_minus,
    D,
    BF16: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum BLOCK elements of dw of one feature; the first block also sums db, in float64."""
    f = tl.program_id(0).to(tl.int64)
    begin = tl.load(p_start + f)
    end = tl.load(p_start + f + 1)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    slope = tl.zeros([ROWS], tl.float64)
    for j0 in range(begin, end, ROWS):
        j = j0 + tl.arange(0, ROWS)
        live = j < end
        code = tl.load(p_codes + j, mask=live, other=0)
        g = tl.load(p_grad + code, mask=live, other=0.0)
        slope += g.to(tl.float64)
        if p_dw is not None:
            row = tl.load(p_rows + code, mask=live, other=0)
            total = _add_rows(total, p_x, x_stride, p_minus, row, g, live, c, D, BF16)
    if p_dw is not None:
        tl.store(p_dw + f * D + c, total, mask=c < D)
    if tl.program_id(1) == 0:
        tl.store(p_db + f, tl.sum(slope, 0).to(tl.float32))


def launch_topk_encode_backward(
    grad: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    x: Tensor,
    w_enc: Tensor,
    b_pre: Tensor | None,
    precision: int,
    *needed: bool,  # the gradient of x; that of w_enc
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch on the arguments of the schema."""
    need_x, need_w = needed
    with torch.no_grad(), on_device(x):
        given = operands(x, w_enc, None, b_pre, precision)
        (rows, width), features, device = given.x.shape, given.w.shape[0], x.device
        slopes, which = grad.contiguous().flatten(), indices.contiguous().flatten()
        kept = indices.shape[1] if offsets is None else 0
        block = min(WIDEST, triton.next_power_of_2(max(width, 16)))
        sizes = {"BF16": given.bf16, "ROWS": GATHERED, "BLOCK": block, "num_warps": 4}
        pieces = triton.cdiv(width, block)
        dx = torch.empty((rows, width) if need_x else 0, dtype=torch.float32, device=device)
        dw = torch.empty((features, width) if need_w else 0, dtype=torch.float32, device=device)
        db = torch.empty(features, dtype=torch.float32, device=device)
        if need_x and rows > 0:
            launch(
                input_kernel, (rows, pieces),
                dx, slopes, which, offsets, given.w, given.w.stride(0), width, features, kept,
                **sizes,
            )  # fmt: skip
        launch(
            weight_kernel, (features, pieces if need_w else 1),
            dw if need_w else None, db, slopes, *_by_feature(which, offsets, rows, features),
            given.x, given.x.stride(0), given.minus, width, **sizes,
        )  # fmt: skip
        return dx, dw, db


def _by_feature(
    which: Tensor, offsets: Tensor | None, rows: int, features: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(codes sorted by feature, then by row; the row of every code; where features start)."""
    device = which.device
    of_row = torch.arange(rows, dtype=torch.int32, device=device)
    if offsets is None:
        of_row = of_row.repeat_interleave(which.numel() // max(rows, 1))
    else:
        of_row = of_row.repeat_interleave(offsets.diff(), output_size=which.numel())
    used = torch.where((which >= 0) & (which < features), which, features)
    found, order = used.sort(stable=True)
    names = torch.arange(features + 1, dtype=found.dtype, device=device)
    return order, of_row, torch.searchsorted(found, names)
