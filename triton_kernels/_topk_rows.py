# SPDX-License-Identifier: Apache-2.0
"""Rows of ``topk_encode``: packed into 16 bits for the screen, or valued exactly.

The screen is a product of float16 on the matrix units, accumulated in float32. Every row has a
power of two of its own as scale, so that float16 keeps three bits more than bfloat16 at the same
speed, and rows that were rounded to bfloat16 lose nothing. With x = x' + e and w = w' + g after
rounding, |<x, w> - <x', w'>| <= |e| |w| + |x'| |g|: a bound of what was really lost, one number a
row, to which `accumulated` adds what the matrix units may lose in their sums.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

import triton

from ._launch import launch

# Rows with an element beyond these are not packed: their scale would leave the range of float32.
_HUGE = tl.constexpr(2.0**60)
_TINY = tl.constexpr(2.0**-50)
# What the bounds may lose when they are computed: far more than float32 does.
_SAFE = tl.constexpr(1.0 + 2.0**-9)
PACK_TILE = 1024  # elements a program packs at a time
WIDTH_UNIT = 16  # elements to which packed rows are padded, for the matrix units
# Left alone, the ptxas of Triton 3.6 (12.8) stops at 48 registers and spills; that of 3.9 spills
# only where it is told a number.
_VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
PACK_REGISTERS: dict[str, int] = {"maxnreg": 80} if _VERSION < (3, 7) else {}
VALUE_ROWS, VALUE_BLOCK = 16, 128


class Packed(NamedTuple):
    """Rows as the screen sees them.

    Attributes:
        codes: [R, d padded] float16.
        bounds: [3, R] float32: what one unit of the codes is worth, a bound of the length of the
            row and of what rounding took from it; infinite where a row is not packed.

    Rows added to pad a dictionary are all zeros.
    """

    codes: Tensor
    bounds: Tensor


class Operands(NamedTuple):
    """Arguments of `topk_encode` as the kernels take them: rows and vectors without gaps."""

    x: Tensor
    w: Tensor
    bias: Tensor | None
    minus: Tensor | None
    bf16: bool


def floats(t: Tensor | None) -> Tensor | None:
    """A vector as float32 without gaps."""
    return None if t is None else t.float().contiguous()


def operands(
    x: Tensor, w_enc: Tensor, b_enc: Tensor | None, b_pre: Tensor | None, precision: int
) -> Operands:
    """Of the arguments of the schema; precision 1 is bfloat16, the others are float32's."""
    rows, w = (t if t.stride(1) == 1 else t.contiguous() for t in (x, w_enc))
    return Operands(rows, w, floats(b_enc), floats(b_pre), precision == 1)


def accumulated(width: int) -> float:
    """What the sums of one product may lose, as a share of |x| |w|.

    Matrix units add blocks of 8 or 16 products to the sum and may cut every term at the 24th bit
    of the largest: less than 1.25 d 2^-23 in all.
    """
    return float(width) * 2.0**-22


@triton.jit
def order_of(z):
    """Order of values as int32: NaN above infinity above numbers; nothing below zero counts."""
    bits = z.to(tl.int32, bitcast=True)
    return tl.where(z != z, 0x7FFFFFFF, tl.where(z > 0.0, bits, 0))


@triton.jit
def _to_bf16(v):
    """Round float32 to the numbers of bfloat16, nearest even; NaN and infinity stay."""
    bits = v.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return tl.where((bits & 0x7F800000) == 0x7F800000, v, rounded.to(tl.float32, bitcast=True))


@triton.jit
def load_centred(p_row, p_minus, c, in_row, D, BF16: tl.constexpr):
    """Elements c of rows, less those of p_minus, as the products see them; 0 from D on."""
    v = tl.load(p_row + c, mask=in_row & (c < D), other=0.0).to(tl.float32)
    if p_minus is not None:
        v -= tl.load(p_minus + c, mask=c < D, other=0.0)
    if BF16:
        v = _to_bf16(v)
    return v


@triton.jit(do_not_specialize=["R", "R_OUT"])
def pack_kernel(
    p_codes,  # [R_OUT, PADDED]
    p_bounds,  # [3, R_OUT]
    p_rows,  # [R, D]
    p_minus,  # [D] or None
    stride,
    R,
    R_OUT,
    D,
    PADDED,
    BF16: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Pack ROWS rows: the largest element of each gives its scale, then codes and what they lost.

    Rows from R on are zeros. Moved: every row once from memory, once more from cache, and two
    bytes an element out.
    """
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_r = (r < R)[:, None]
    out_r = r < R_OUT
    p_row = p_rows + (r * stride)[:, None]
    largest = tl.zeros([ROWS, BLOCK], tl.float32)
    wild = tl.zeros([ROWS, BLOCK], tl.int32)
    for c0 in range(0, D, BLOCK):
        c = (c0 + tl.arange(0, BLOCK))[None, :]
        size = tl.abs(load_centred(p_row, p_minus, c, in_r, D, BF16))
        wild |= tl.where(size <= _HUGE, 0, 1)  # NaN too
        largest = tl.maximum(largest, size)
    top = tl.max(largest, 1)
    finite = tl.max(wild, 1) == 0
    scaled = finite & (top >= _TINY)
    exponent = tl.where(scaled, (top.to(tl.int32, bitcast=True) >> 23) - 127, 0)
    # Powers of two, put together from their exponents (127 stands for 0): float16 holds the largest
    # element as 2^14 to 2^15, so that its steps end 39 bits below.
    scale = ((127 + 14 - exponent) << 23).to(tl.float32, bitcast=True)
    unit = ((exponent + 127 - 14) << 23).to(tl.float32, bitcast=True)
    length = tl.zeros([ROWS, BLOCK], tl.float32)
    lost = tl.zeros([ROWS, BLOCK], tl.float32)
    for c0 in range(0, PADDED, BLOCK):
        c = (c0 + tl.arange(0, BLOCK))[None, :]
        v = load_centred(p_row, p_minus, c, in_r, D, BF16)
        v = tl.where(scaled[:, None], v, 0.0) * scale[:, None]
        code = v.to(tl.float16)
        rest = v - code.to(tl.float32)
        length += v * v
        lost += rest * rest
        tl.store(p_codes + (r * PADDED)[:, None] + c, code, mask=out_r[:, None] & (c < PADDED))
    # A row of tiny elements is packed as zeros: all of it is lost, and that is next to nothing.
    small = tl.where(top > 0.0, tl.sqrt(tl.zeros([ROWS], tl.float32) + D) * _TINY, 0.0)
    unpacked = tl.where(finite, small, float("inf"))
    length_r = tl.where(scaled, tl.sqrt(tl.sum(length, 1)) * unit * _SAFE, unpacked)
    lost_r = tl.where(scaled, tl.sqrt(tl.sum(lost, 1)) * unit * _SAFE, unpacked)
    tl.store(p_bounds + r, tl.where(scaled, unit, 0.0), mask=out_r)
    tl.store(p_bounds + R_OUT + r, length_r, mask=out_r)
    tl.store(p_bounds + 2 * R_OUT + r, lost_r, mask=out_r)


def pack(rows: Tensor, minus: Tensor | None, bf16: bool, *, unit: int = 1) -> Packed:
    """Pack rows [R, d] less a vector, and rows of zeros up to a multiple of `unit`."""
    count, width = rows.shape
    out, padded = triton.cdiv(count, unit) * unit, triton.cdiv(width, WIDTH_UNIT) * WIDTH_UNIT
    codes = torch.empty(out, padded, dtype=torch.float16, device=rows.device)
    bounds = torch.empty(3, out, dtype=torch.float32, device=rows.device)
    block = min(512, triton.next_power_of_2(padded))
    together = PACK_TILE // block
    launch(
        pack_kernel, (triton.cdiv(out, together),),
        codes, bounds, rows, minus, rows.stride(0), count, out, width, padded,
        BF16=bf16, ROWS=together, BLOCK=block, num_warps=4,
        **PACK_REGISTERS,
    )  # fmt: skip
    return Packed(codes, bounds)


def products(x: Tensor, w: Tensor, out: Tensor) -> None:
    """out = x w^T of codes, summed in float32: cuBLAS, or plain torch for the interpreter."""
    if not x.is_cuda:
        torch.mm(x.float(), w.float().mT, out=out)
        return
    switch = torch.backends.cuda.matmul
    before = switch.allow_fp16_accumulation
    switch.allow_fp16_accumulation = False  # sums in float16 would break the bound
    try:
        torch.ops.aten.mm.dtype_out(x, w.mT, torch.float32, out=out)
    finally:
        switch.allow_fp16_accumulation = before


@triton.jit
def exact(
    p_row, p_minus, p_w, w_stride, p_bias, f, live, D,
    BF16: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """z of one row at features f [ROWS]: summed in float64, rounded once; NaN-free where not live.

    Products of float32 are exact in float64, so that the order of the sum decides nothing that
    float32 shows.
    """
    total = tl.zeros([ROWS, BLOCK], tl.float64)
    p_f = p_w + f.to(tl.int64)[:, None] * w_stride
    for c0 in range(0, D, BLOCK):
        c = c0 + tl.arange(0, BLOCK)
        v = load_centred(p_row, p_minus, c, c < D, D, BF16)
        w = tl.load(p_f + c[None, :], mask=live[:, None] & (c < D)[None, :], other=0.0)
        w = w.to(tl.float32)
        if BF16:
            w = _to_bf16(w)
        total += v.to(tl.float64)[None, :] * w.to(tl.float64)
    z = tl.sum(total, 1)
    if p_bias is not None:
        z += tl.load(p_bias + f, mask=live, other=0.0).to(tl.float64)
    return tl.where(live, z.to(tl.float32), 0.0)


@triton.jit(do_not_specialize=["N", "capacity"])
def value_kernel(
    p_values,  # pool, like p_lists
    p_lists,  # pool: the lists of the rows
    p_start,  # [N]: where they start; None: capacity slots each
    p_counts,  # [N]
    p_up,  # pool: order that a value may reach at most, or None
    p_floor,  # [1]: order below which none is valued
    p_limit,  # [F]: values not above become 0, or None
    p_x,
    p_minus,
    p_w,
    p_bias,
    x_stride,
    w_stride,
    N,
    D,
    capacity,
    BF16: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Value the candidates of a row, ROWS dictionary rows at a time.

    Several programs share a row. Moved: d elements a candidate, gathered; bound by that.
    """
    n = tl.program_id(0).to(tl.int64)
    start = n * capacity
    if p_start is not None:
        start = tl.load(p_start + n)
    count = tl.load(p_counts + n)
    for j0 in range(tl.program_id(1) * ROWS, count, tl.num_programs(1) * ROWS):
        j = j0 + tl.arange(0, ROWS)
        at = start + j
        listed = (j < count) & (at >= 0)
        if p_start is not None:
            listed &= at < capacity
        f = tl.load(p_lists + at, mask=listed, other=0)
        live = listed
        if p_up is not None:
            live &= tl.load(p_up + at, mask=listed, other=0) >= tl.load(p_floor)
        z = exact(p_x + n * x_stride, p_minus, p_w, w_stride, p_bias, f, live, D, BF16, ROWS, BLOCK)
        if p_limit is not None:
            z = tl.where(z <= tl.load(p_limit + f, mask=live, other=0.0), 0.0, z)
        tl.store(p_values + at, z, mask=listed)


def value(
    given: Operands,
    lists: Tensor,
    counts: Tensor,
    capacity: int,
    *,
    start: Tensor | None = None,
    up: Tensor | None = None,
    floor: Tensor | None = None,
    limit: Tensor | None = None,
) -> Tensor:
    """Values of the candidates in lists, which start at `start` or every `capacity` slots."""
    values = torch.zeros(lists.shape, dtype=torch.float32, device=lists.device)
    rows, width = given.x.shape
    # Enough programs to fill a GPU when rows are few.
    share = max(1, min(8, 2048 // max(rows, 1)))
    launch(
        value_kernel, (rows, share), values, lists, start, counts, up, floor, limit,
        given.x, given.minus, given.w, given.bias, given.x.stride(0), given.w.stride(0),
        rows, width, capacity,
        BF16=given.bf16, ROWS=VALUE_ROWS, BLOCK=VALUE_BLOCK, num_warps=4,
    )  # fmt: skip
    return values
