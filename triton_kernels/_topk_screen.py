# SPDX-License-Identifier: Apache-2.0
"""The screen of ``topk_encode``: which features of a row may belong to its codes.

cuBLAS multiplies packed rows by the packed dictionary, a chunk of rows at a time, into a scratch
buffer made to stay in the second-level cache; the filter here reads it there. A feature's value
lies within `eps` of what the product says, so that k features with a lower bound of at least `cut`
prove that none below it belongs to the k largest: the screen decides by proof, not by chance.

The cut comes from maxima over LANES groups of features: k groups with a maximum at or above it hold
k different features. With LANES a multiple of k few groups hold two, so the lists are little longer
than what the bounds make them; no sort, and one more read of the scratch.

A row that is not finite, or whose list outgrows its memory, is valued in full by `full_kernel`,
decided on the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

import triton

from ._topk_rows import (
    VALUE_BLOCK,
    VALUE_ROWS,
    Operands,
    Packed,
    accumulated,
    exact,
    order_of,
    products,
)

# Products held at a time: two thirds of the second-level cache of an H100, but enough rows for the
# matrix units to outrun the memory that the dictionary is read from.
CHUNK_BYTES = 32 << 20
LEAST_ROWS = 512
# Programs that value rows in full, each with a scratch row.
FULL_PROGRAMS = 128
# Rounding of the product's scale and of adding the bias, of either size.
_ROUNDING = tl.constexpr(2.0**-21)
# Bits of the order in which the cut is found: finer than the bounds are.
_COARSE = tl.constexpr(8)


class Lists(NamedTuple):
    """Where the candidates of each row are written.

    Attributes:
        features: [slots] int32.
        counts: [N] int32: of every row.
        failed: [N] int32: the first `state[0]` name rows to be valued in full.
        state: [2] int64: rows that failed; slots claimed.
        capacity: slots of a row, or of the pool.
        start: [N] int64: where a row of the pool starts; None without a pool.
        low: [slots] int32, pool only: order of the least value a candidate may have.
        up: [slots] int32, pool only: of the largest.
        cut: [N] int32, pool only: order from which on every feature of a row is listed.
    """

    features: Tensor
    counts: Tensor
    failed: Tensor
    state: Tensor
    capacity: int
    start: Tensor | None = None
    low: Tensor | None = None
    up: Tensor | None = None
    cut: Tensor | None = None


def chunk_rows(features: int) -> int:
    """Rows whose products are held at a time."""
    return max(LEAST_ROWS, CHUNK_BYTES // (4 * features) // 128 * 128)


def lanes_for(features: int, k: int) -> int:
    """Groups of features whose maxima give the cut, 8 for each of the k largest."""
    return min(triton.next_power_of_2(max(features, 16)), max(512, min(4096, _pow2(8 * k))))


def _pow2(n: int) -> int:
    return int(triton.next_power_of_2(max(n, 1)))


@triton.jit
def _screened(p_z, f, in_f, x_unit, x_length, x_lost, p_w, F, p_bias, share):
    """Value of the screen at features f and how far the true one may be from it."""
    unit = tl.load(p_w + f, mask=in_f, other=0.0)
    length = tl.load(p_w + F + f, mask=in_f, other=0.0)
    lost = tl.load(p_w + 2 * F + f, mask=in_f, other=0.0)
    s = tl.load(p_z + f, mask=in_f, other=0.0) * x_unit * unit
    eps = x_lost * length + (x_length + x_lost) * (lost + share * (length + lost))
    eps += tl.abs(s) * _ROUNDING
    if p_bias is not None:
        b = tl.load(p_bias + f, mask=in_f, other=0.0)
        s += b
        eps += tl.abs(b) * _ROUNDING
    return s, eps


@triton.jit
def _least(s, eps):
    """Order of a lower bound; a bound that is not a number bounds nothing."""
    low = s - eps
    return tl.where(low != low, 0, order_of(low))


@triton.jit
def _most(s, eps):
    """Order of an upper bound; a feature without one may be anything, even NaN."""
    up = s + eps
    return tl.where((up != up) | (eps == float("inf")), 0x7FFFFFFF, order_of(up))


@triton.jit
def _may_belong(s, eps, f, in_f, cut, p_limit):
    """Features that may reach the cut and exceed their limit."""
    keep = in_f & (_most(s, eps) >= tl.maximum(cut, 1))
    if p_limit is not None:
        keep &= (s + eps <= tl.load(p_limit + f, mask=in_f, other=0.0)) == 0
    return keep


@triton.jit
def _write(p_lists, p_low, p_up, at, f, low, up, keep):
    tl.store(p_lists + at, f, mask=keep)
    if p_low is not None:
        tl.store(p_low + at, low, mask=keep)
        tl.store(p_up + at, up, mask=keep)


@triton.jit
def _cut_of_groups(p_z, x_unit, x_length, x_lost, p_w, F, p_bias, share, K, LANES: tl.constexpr):
    """Order that at least K features reach for certain; 0 if there are fewer."""
    best = tl.zeros([LANES], tl.int32)
    for f0 in range(0, F, LANES):
        f = f0 + tl.arange(0, LANES)
        in_f = f < F
        s, eps = _screened(p_z, f, in_f, x_unit, x_length, x_lost, p_w, F, p_bias, share)
        best = tl.maximum(best, tl.where(in_f, _least(s, eps), 0))
    cut = tl.full((), 0, tl.int32)
    for bit in tl.static_range(30, _COARSE - 1, -1):
        higher = cut | (1 << bit)
        cut = tl.where(tl.sum((best >= higher).to(tl.int32), 0) >= K, higher, cut)
    return cut


@triton.jit
def _report_failure(p_failed, p_state, row):
    """The order in which rows fail decides nothing."""
    tl.store(p_failed + tl.atomic_add(p_state, 1), row.to(tl.int32))


@triton.jit(do_not_specialize=["first", "N", "F", "K", "capacity"])
def screen_kernel(
    p_lists,
    p_low,
    p_up,
    p_counts,
    p_start,
    p_cut,
    p_failed,
    p_state,
    p_products,  # [rows of the chunk, F]
    p_x,  # bounds [3, N]
    p_w,  # bounds [3, F]
    p_bias,  # [F] or None
    p_limit,  # [F] or None
    share,
    first,  # row of the batch that the chunk starts with
    N,
    F,
    K,  # features whose cut is looked for; used if RANKED
    capacity,
    RANKED: tl.constexpr,  # the cut is found here; else it is read
    POOL: tl.constexpr,  # rows claim their slots from a pool; else each has `capacity`
    LANES: tl.constexpr,
):
    """List the features of one row that may belong to the codes, indices ascending."""
    n = tl.program_id(0).to(tl.int64)
    row = first + n
    p_z = p_products + n * F
    x_unit = tl.load(p_x + row)
    x_length = tl.load(p_x + N + row)
    x_lost = tl.load(p_x + 2 * N + row)
    if x_length == float("inf"):
        _report_failure(p_failed, p_state, row)
    else:
        if RANKED:
            cut = _cut_of_groups(p_z, x_unit, x_length, x_lost, p_w, F, p_bias, share, K, LANES)
            if POOL:
                tl.store(p_cut + row, cut)
        else:
            cut = tl.load(p_cut + row)
        start = row * capacity
        room = start + capacity
        if POOL:
            total = tl.zeros([LANES], tl.int32)
            for f0 in range(0, F, LANES):
                f = f0 + tl.arange(0, LANES)
                in_f = f < F
                s, eps = _screened(p_z, f, in_f, x_unit, x_length, x_lost, p_w, F, p_bias, share)
                total += _may_belong(s, eps, f, in_f, cut, p_limit).to(tl.int32)
            start = tl.atomic_add(p_state + 1, tl.sum(total, 0).to(tl.int64))
            tl.store(p_start + row, start)
            room = tl.zeros((), tl.int64) + capacity
        count = 0
        for f0 in range(0, F, LANES):
            f = f0 + tl.arange(0, LANES)
            in_f = f < F
            s, eps = _screened(p_z, f, in_f, x_unit, x_length, x_lost, p_w, F, p_bias, share)
            keep = _may_belong(s, eps, f, in_f, cut, p_limit)
            here = keep.to(tl.int32)
            at = start + count + tl.cumsum(here, 0) - 1
            _write(p_lists, p_low, p_up, at, f, _least(s, eps), _most(s, eps), keep & (at < room))
            count += tl.sum(here, 0)
        if not POOL:
            if count > capacity:
                _report_failure(p_failed, p_state, row)
                count = 0
        tl.store(p_counts + row, count)


@triton.jit
def _count_orders(p_z, least, F, LANES: tl.constexpr):
    """Values of a valued row whose order is at least `least`."""
    total = tl.zeros([LANES], tl.int32)
    for f0 in range(0, F, LANES):
        f = f0 + tl.arange(0, LANES)
        z = tl.load(p_z + f, mask=f < F, other=0.0)
        total += ((order_of(z) >= least) & (f < F)).to(tl.int32)
    return tl.sum(total, 0)


@triton.jit
def _taken(z, f, in_f, above, ties, seen, p_limit):
    """(kept, ties among them): orders above `above`, and of those at it the first `ties`."""
    order = order_of(z)
    tied = in_f & (order == above) & (order > 0)
    keep = tied & (seen + tl.cumsum(tied.to(tl.int32), 0) <= ties)
    keep |= in_f & (order > above)
    if p_limit is not None:
        keep &= (z <= tl.load(p_limit + f, mask=in_f, other=0.0)) == 0
    return keep, tl.sum(tied.to(tl.int32), 0)


@triton.jit(do_not_specialize=["F", "D", "K", "capacity"])
def full_kernel(
    p_lists,
    p_low,
    p_up,
    p_counts,
    p_start,
    p_cut,
    p_failed,
    p_state,
    p_scratch,  # [programs, F]
    p_limit,  # [F] or None
    p_x,
    p_minus,
    p_w,
    p_bias,
    x_stride,
    w_stride,
    F,
    D,
    K,
    capacity,
    RANKED: tl.constexpr,
    POOL: tl.constexpr,
    BF16: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Value the rows that failed at every feature, and list what belongs to their codes."""
    p_z = p_scratch + tl.program_id(0).to(tl.int64) * F
    for i in range(tl.program_id(0), tl.load(p_state).to(tl.int32), tl.num_programs(0)):
        row = tl.load(p_failed + i).to(tl.int64)
        p_row = p_x + row * x_stride
        for f0 in range(0, F, ROWS):
            f = f0 + tl.arange(0, ROWS)
            z = exact(p_row, p_minus, p_w, w_stride, p_bias, f, f < F, D, BF16, ROWS, BLOCK)
            tl.store(p_z + f, z, mask=f < F)
        tl.debug_barrier()  # all of the row is written before any of it is read
        ties = tl.full((), 0, tl.int32)
        if RANKED:
            above = tl.full((), 0, tl.int32)
            for bit in range(30, -1, -1):
                higher = above | (1 << bit)
                above = tl.where(_count_orders(p_z, higher, F, LANES) >= K, higher, above)
            if POOL:
                tl.store(p_cut + row, above)
                ties += 0x7FFFFFFF  # whether a tie belongs to the batch is decided later
            else:
                ties += K
                if above < 0x7FFFFFFF:
                    ties -= _count_orders(p_z, above + 1, F, LANES)
        else:
            above = tl.maximum(tl.load(p_cut + row), 1) - 1
        start = row * capacity
        if POOL:
            total = 0
            seen = 0
            for f0 in range(0, F, LANES):
                f = f0 + tl.arange(0, LANES)
                z = tl.load(p_z + f, mask=f < F, other=0.0)
                keep, tied_here = _taken(z, f, f < F, above, ties, seen, p_limit)
                total += tl.sum(keep.to(tl.int32), 0)
                seen += tied_here
            start = tl.atomic_add(p_state + 1, total.to(tl.int64))
            tl.store(p_start + row, start)
        room = start + capacity
        if POOL:
            room = tl.zeros((), tl.int64) + capacity
        count = 0
        seen = 0
        for f0 in range(0, F, LANES):
            f = f0 + tl.arange(0, LANES)
            z = tl.load(p_z + f, mask=f < F, other=0.0)
            keep, tied_here = _taken(z, f, f < F, above, ties, seen, p_limit)
            here = keep.to(tl.int32)
            at = start + count + tl.cumsum(here, 0) - 1
            order = order_of(z)
            _write(p_lists, p_low, p_up, at, f, order, order, keep & (at < room))
            count += tl.sum(here, 0)
            seen += tied_here
        tl.store(p_counts + row, count)
        tl.debug_barrier()  # read by all before the next row is written


def screen(
    given: Operands,
    x: Packed,
    w: Packed,
    lists: Lists,
    *,
    k: int,
    ranked: bool,
    limit: Tensor | None = None,
) -> None:
    """Fill the lists with all features that may belong to the codes."""
    rows, features = x.codes.shape[0], w.codes.shape[0]
    chunk = min(rows, chunk_rows(features))
    scratch = torch.empty(chunk, features, dtype=torch.float32, device=x.codes.device)
    share = accumulated(x.codes.shape[1])
    lanes = lanes_for(features, k)
    pool = lists.start is not None
    where = (
        lists.features, lists.low, lists.up, lists.counts, lists.start, lists.cut,
        lists.failed, lists.state,
    )  # fmt: skip
    warps = 8 if lanes > 1024 else 4
    for first in range(0, rows, chunk):
        count = min(chunk, rows - first)
        products(x.codes[first : first + count], w.codes, scratch[:count])
        screen_kernel[(count,)](
            *where, scratch, x.bounds, w.bounds, given.bias, limit, share,
            first, rows, features, k, lists.capacity,
            RANKED=ranked, POOL=pool, LANES=lanes, num_warps=warps,
        )  # fmt: skip
    programs = min(rows, FULL_PROGRAMS)
    full_kernel[(programs,)](
        *where, torch.empty(programs, features, dtype=torch.float32, device=x.codes.device),
        limit, given.x, given.minus, given.w, given.bias, given.x.stride(0), given.w.stride(0),
        features, given.x.shape[1], k, lists.capacity,
        RANKED=ranked, POOL=pool, BF16=given.bf16, LANES=lanes, ROWS=VALUE_ROWS,
        BLOCK=VALUE_BLOCK, num_warps=warps,
        maxnreg=255,  # one program for each multiprocessor: nothing to gain from using fewer
    )  # fmt: skip
