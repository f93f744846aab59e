# SPDX-License-Identifier: Apache-2.0
"""Rows of ``topk_encode`` that the screen cannot decide: valued at every feature.

Rows that are not finite, or whose list outgrew its memory. Which they are is known on the device
only, so the kernel runs at every call and mostly finds nothing to do.
"""

from __future__ import annotations

import triton.language as tl

import triton

from ._topk_rows import exact, order_of

# Programs that value rows in full, each with a scratch row.
FULL_PROGRAMS = 128


@triton.jit
def write_candidates(p_lists, p_low, p_up, at, f, low, up, keep):
    """Write features, and in a pool the bounds of their orders."""
    tl.store(p_lists + at, f, mask=keep)
    if p_low is not None:
        tl.store(p_low + at, low, mask=keep)
        tl.store(p_up + at, up, mask=keep)


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


@triton.jit(do_not_specialize=["K", "capacity"])
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
            write_candidates(p_lists, p_low, p_up, at, f, order, order, keep & (at < room))
            count += tl.sum(here, 0)
            seen += tied_here
        tl.store(p_counts + row, count)
        tl.debug_barrier()  # read by all before the next row is written
