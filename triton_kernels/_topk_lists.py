# SPDX-License-Identifier: Apache-2.0
"""Candidates of ``topk_encode``, from the maxima of groups: a fixed width a row, or from a pool.

One program owns a row. The cut is an order that k groups reach for certain: k different features.
The groups whose upper bound reaches it are listed first, and then only these are looked into.
Indices ascend in every list. Moved: 16 bytes a group, 20 a feature of the groups visited.
"""

from __future__ import annotations

from typing import NamedTuple

import triton.language as tl
from torch import Tensor

import triton

from ._topk_full import write_candidates
from ._topk_rows import order_of

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
def _factors(p_x, row, N, share):
    """(length, unit, factor of a feature's length, factor of its loss) of one row."""
    length = tl.load(p_x + N + row)
    lost = tl.load(p_x + 2 * N + row)
    whole = length + lost
    return length, tl.load(p_x + row), lost + whole * share, whole * (1.0 + share)


@triton.jit
def _group_bounds(p_maxima, p_groups, p_bias, g, in_g, groups, by_length, by_lost):
    """Largest value of the screen in groups g and how far the true largest may be from it."""
    top = tl.load(p_maxima + g, mask=in_g, other=0.0)
    eps = by_length * tl.load(p_groups + g, mask=in_g, other=0.0)
    eps += by_lost * tl.load(p_groups + groups + g, mask=in_g, other=0.0)
    eps += tl.abs(top) * _ROUNDING
    if p_bias is not None:
        # What was added to a bias is no larger than the sum and the bias together.
        eps += tl.load(p_groups + 2 * groups + g, mask=in_g, other=0.0) * (2 * _ROUNDING)
    return top, eps


@triton.jit
def _cut_of_groups(
    p_maxima, p_groups, p_bias, groups, by_length, by_lost, K, LANES: tl.constexpr,
):  # fmt: skip
    """Order that at least K features reach for certain; 0 if there are fewer."""
    best = tl.zeros([LANES], tl.int32)
    for g0 in range(0, groups, LANES):
        g = g0 + tl.arange(0, LANES)
        top, eps = _group_bounds(
            p_maxima, p_groups, p_bias, g, g < groups, groups, by_length, by_lost
        )
        best = tl.maximum(best, tl.where(g < groups, _least(top, eps), 0))
    cut = tl.full((), 0, tl.int32)
    for bit in range(30, _COARSE - 1, -1):
        higher = cut | (1 << bit)
        cut = tl.where(tl.sum((best >= higher).to(tl.int32), 0) >= K, higher, cut)
    return cut


@triton.jit
def _groups_to_visit(
    p_visits, p_maxima, p_groups, p_bias, p_limit, groups, by_length, by_lost, cut,
    LANES: tl.constexpr,
):  # fmt: skip
    """List the groups that may hold a feature of the codes, ascending; returns how many."""
    count = 0
    for g0 in range(0, groups, LANES):
        g = g0 + tl.arange(0, LANES)
        in_g = g < groups
        top, eps = _group_bounds(p_maxima, p_groups, p_bias, g, in_g, groups, by_length, by_lost)
        reach = in_g & (_most(top, eps) >= tl.maximum(cut, 1))
        if p_limit is not None:
            limit = tl.load(p_groups + 3 * groups + g, mask=in_g, other=0.0)
            reach &= (top + eps <= limit) == 0
        here = reach.to(tl.int32)
        tl.store(p_visits + count + tl.cumsum(here, 0) - 1, g, mask=reach)
        count += tl.sum(here, 0)
    tl.debug_barrier()  # written by all before any of them is read
    return count


@triton.jit
def _visit(
    p_visits, p_z, p_w, p_bias, p_limit, i0, visits, F, PADDED, x_unit, by_length, by_lost, cut,
    GROUP: tl.constexpr, VISITS: tl.constexpr,
):  # fmt: skip
    """(f, s, eps, kept) of the features of VISITS groups [VISITS, GROUP]."""
    i = i0 + tl.arange(0, VISITS)
    g = tl.load(p_visits + i, mask=i < visits, other=0)
    f = g[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    listed = (i < visits)[:, None]
    s = tl.load(p_z + f, mask=listed, other=0.0) * x_unit * tl.load(p_w + f, mask=listed, other=0.0)
    eps = by_length * tl.load(p_w + PADDED + f, mask=listed, other=0.0)
    eps += by_lost * tl.load(p_w + 2 * PADDED + f, mask=listed, other=0.0)
    eps += tl.abs(s) * _ROUNDING
    in_f = listed & (f < F)
    if p_bias is not None:
        b = tl.load(p_bias + f, mask=in_f, other=0.0)
        s += b
        eps += tl.abs(b) * _ROUNDING
    keep = in_f & (_most(s, eps) >= tl.maximum(cut, 1))
    if p_limit is not None:
        keep &= (s + eps <= tl.load(p_limit + f, mask=in_f, other=0.0)) == 0
    return f, s, eps, keep


@triton.jit
def _places(here):
    """(number of each of the kept [VISITS, GROUP], how many)."""
    of_groups = tl.sum(here, 1)
    before = tl.cumsum(of_groups, 0) - of_groups
    return before[:, None] + tl.cumsum(here, 1) - 1, tl.sum(of_groups, 0)


@triton.jit
def _report_failure(p_failed, p_state, row):
    """The order in which rows fail decides nothing."""
    tl.store(p_failed + tl.atomic_add(p_state, 1), row.to(tl.int32))


@triton.jit(do_not_specialize=["first", "N", "K", "capacity"])
def list_kernel(
    p_lists,  # [N, capacity]
    p_counts,
    p_failed,
    p_state,
    p_visits,  # [rows of the chunk, groups]
    p_products,  # [rows of the chunk, PADDED]
    p_maxima,  # [rows of the chunk, groups]
    p_groups,  # [4, groups]
    p_x,  # bounds [3, N]
    p_w,  # bounds [3, PADDED]
    p_bias,  # [F] or None
    share,
    first,  # row of the batch that the chunk starts with
    N,
    F,
    PADDED,
    GROUPS,
    K,
    capacity,
    GROUP: tl.constexpr,
    LANES: tl.constexpr,
    VISITS: tl.constexpr,
):
    """List the features of one row that may be among its K largest."""
    n = tl.program_id(0).to(tl.int64)
    row = first + n
    p_visits += n * GROUPS
    p_maxima += n * GROUPS
    p_z = p_products + n * PADDED
    length, x_unit, by_length, by_lost = _factors(p_x, row, N, share)
    if length == float("inf"):
        _report_failure(p_failed, p_state, row)
    else:
        cut = _cut_of_groups(p_maxima, p_groups, p_bias, GROUPS, by_length, by_lost, K, LANES)
        visits = _groups_to_visit(
            p_visits, p_maxima, p_groups, p_bias, None, GROUPS, by_length, by_lost, cut, LANES
        )
        count = 0
        for i0 in range(0, visits, VISITS):
            f, _, _, keep = _visit(
                p_visits, p_z, p_w, p_bias, None, i0, visits, F, PADDED, x_unit, by_length,
                by_lost, cut, GROUP, VISITS,
            )  # fmt: skip
            place, kept = _places(keep.to(tl.int32))
            at = count + place
            tl.store(p_lists + row * capacity + at, f, mask=keep & (at < capacity))
            count += kept
        if count > capacity:
            _report_failure(p_failed, p_state, row)
            count = 0
        tl.store(p_counts + row, count)


@triton.jit(do_not_specialize=["first", "N", "K", "capacity"])
def pool_kernel(
    p_lists,  # [capacity], like p_low and p_up
    p_low,
    p_up,
    p_counts,
    p_start,
    p_cut,
    p_failed,
    p_state,
    p_visits,
    p_products,
    p_maxima,
    p_groups,
    p_x,
    p_w,
    p_bias,
    p_limit,  # [F] or None
    share,
    first,
    N,
    F,
    PADDED,
    GROUPS,
    K,  # features whose cut is looked for; used if RANKED
    capacity,
    RANKED: tl.constexpr,  # the cut is found here; else it is read
    GROUP: tl.constexpr,
    LANES: tl.constexpr,
    VISITS: tl.constexpr,
):
    """List the features of one row that reach its cut and their limits, in slots it claims."""
    n = tl.program_id(0).to(tl.int64)
    row = first + n
    p_visits += n * GROUPS
    p_maxima += n * GROUPS
    p_z = p_products + n * PADDED
    length, x_unit, by_length, by_lost = _factors(p_x, row, N, share)
    if length == float("inf"):
        _report_failure(p_failed, p_state, row)
    else:
        if RANKED:
            cut = _cut_of_groups(p_maxima, p_groups, p_bias, GROUPS, by_length, by_lost, K, LANES)
            tl.store(p_cut + row, cut)
        else:
            cut = tl.load(p_cut + row)
        visits = _groups_to_visit(
            p_visits, p_maxima, p_groups, p_bias, p_limit, GROUPS, by_length, by_lost, cut, LANES
        )
        total = tl.zeros([VISITS, GROUP], tl.int32)
        for i0 in range(0, visits, VISITS):
            _, _, _, keep = _visit(
                p_visits, p_z, p_w, p_bias, p_limit, i0, visits, F, PADDED, x_unit, by_length,
                by_lost, cut, GROUP, VISITS,
            )  # fmt: skip
            total += keep.to(tl.int32)
        slots = tl.sum(tl.sum(total, 1), 0)
        start = tl.atomic_add(p_state + 1, slots.to(tl.int64))
        tl.store(p_start + row, start)
        for i0 in range(0, visits, VISITS):
            f, s, eps, keep = _visit(
                p_visits, p_z, p_w, p_bias, p_limit, i0, visits, F, PADDED, x_unit, by_length,
                by_lost, cut, GROUP, VISITS,
            )  # fmt: skip
            place, kept = _places(keep.to(tl.int32))
            at = start + place
            low, up = _least(s, eps), _most(s, eps)
            write_candidates(p_lists, p_low, p_up, at, f, low, up, keep & (at < capacity))
            start += kept
        tl.store(p_counts + row, slots)
