# SPDX-License-Identifier: Apache-2.0
"""``topk_encode_ragged``: the largest features of a whole batch, or all above a threshold.

Rows claim as many slots of a pool as they have candidates, so that memory follows the codes and not
the longest row. Which slots is up to the order in which programs run; what is written where follows
from the rows alone.

A budget for the batch is met by bounds: each row lists its BATCH_SHARE k largest, the lower bounds
of all lists bound the result from below, and what may reach that is valued. A row that lists
nothing as low as the last value kept may hide a feature that belongs to the result: then the screen
runs again from there, which is certain to be low enough.

The host waits once, for the number of codes, and again only if the screen has to be repeated:
where a guess was too high, or lists outgrew the memory they were given.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

import triton

from ._launch import launch, on_device
from ._topk_lists import Lists
from ._topk_rows import Operands, Packed, floats, operands, order_of, pack, value
from ._topk_screen import pack_dictionary, screen

# Candidates listed a row, as a multiple of k: codes a row range over five times their mean in
# trained dictionaries.
BATCH_SHARE = 8
# Slots of the pool for each row where nothing tells how many features exceed a threshold.
THRESHOLD_SLOTS = 256
CODE_BLOCK = 128


class Found(NamedTuple):
    """One run of the screen: the candidates, their values and what is kept of them."""

    lists: Lists
    values: Tensor
    bound: Tensor  # [1] int32: order of the last value kept; 0 keeps everything
    take: Tensor  # [N] int32: codes of the row with exactly this order that are kept
    offsets: Tensor  # [N + 1]
    missed: Tensor  # [1] int64: rows whose lists end above the bound


@triton.jit
def _kept(p_values, at, listed, bound, take, seen):
    """(values, kept, codes at the bound): all above the bound, then the first `take` at it."""
    z = tl.load(p_values + at, mask=listed, other=0.0)
    order = order_of(z)
    tied = listed & (order == bound) & (order > 0)
    keep = tied & (seen + tl.cumsum(tied.to(tl.int32), 0) <= take)
    keep |= listed & (order > bound)
    return z, keep, tl.sum(tied.to(tl.int32), 0)


@triton.jit(do_not_specialize=["slots"])
def tally_kernel(p_greater, p_equal, p_values, p_start, p_counts, p_bound, slots,
                 BLOCK: tl.constexpr):  # fmt: skip
    """Count the values of one row above the bound and at it."""
    n = tl.program_id(0).to(tl.int64)
    start = tl.load(p_start + n)
    count = tl.load(p_counts + n)
    bound = tl.load(p_bound)
    greater = tl.zeros([BLOCK], tl.int32)
    equal = tl.zeros([BLOCK], tl.int32)
    for j0 in range(0, count, BLOCK):
        j = j0 + tl.arange(0, BLOCK)
        listed = (j < count) & (start + j < slots)
        order = order_of(tl.load(p_values + start + j, mask=listed, other=0.0))
        greater += (order > bound).to(tl.int32)
        equal += ((order == bound) & (order > 0)).to(tl.int32)
    tl.store(p_greater + n, tl.sum(greater, 0))
    tl.store(p_equal + n, tl.sum(equal, 0))


@triton.jit(do_not_specialize=["slots"])
def write_kernel(
    p_out_values, p_out_indices, p_offsets, p_values, p_lists, p_start, p_counts, p_bound, p_take,
    slots, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the codes of one row where its offset says."""
    n = tl.program_id(0).to(tl.int64)
    start = tl.load(p_start + n)
    count = tl.load(p_counts + n)
    bound = tl.load(p_bound)
    take = tl.load(p_take + n)
    to = tl.load(p_offsets + n)
    room = tl.load(p_offsets + n + 1)
    seen = 0
    for j0 in range(0, count, BLOCK):
        j = j0 + tl.arange(0, BLOCK)
        at = start + j
        listed = (j < count) & (at < slots)
        z, keep, tied = _kept(p_values, at, listed, bound, take, seen)
        here = keep.to(tl.int32)
        place = to + tl.cumsum(here, 0) - 1
        keep &= place < room
        tl.store(p_out_values + place, z, mask=keep)
        tl.store(p_out_indices + place, tl.load(p_lists + at, mask=listed, other=0), mask=keep)
        to += tl.sum(here, 0)
        seen += tied


def _bound_of(orders: Tensor, budget: int) -> Tensor:
    """The budget-th largest of the pool's orders [1]; 0 where there are fewer."""
    if budget > orders.numel():
        return orders.new_zeros(1)
    return orders.sort(descending=True).values[budget - 1 : budget].clone()


def _orders(values: Tensor) -> Tensor:
    bits = values.view(torch.int32).clamp(min=0)
    return torch.where(values.isnan(), 0x7FFFFFFF, bits).int()


def _find(
    given: Operands,
    packed: tuple[Packed, Packed],
    budget: int,
    limit: Tensor | None,
    cut: Tensor | None,
    share: int,
    slots: int,
) -> Found:
    """Screen from `cut` on (None: from the `share` largest of a row), value, choose."""
    rows, device = given.x.shape[0], given.x.device

    def zeros(n: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.zeros(n, dtype=dtype, device=device)

    lists = Lists(
        zeros(slots), zeros(rows), zeros(rows), zeros(2, torch.int64), slots,
        zeros(rows, torch.int64), zeros(slots), zeros(slots), zeros(rows) if cut is None else cut,
    )  # fmt: skip
    screen(given, *packed, lists, k=share, ranked=cut is None, limit=limit)
    floor = None if limit is not None else _bound_of(lists.low, budget)
    values = value(
        given, lists.features, lists.counts, slots, start=lists.start,
        up=None if floor is None else lists.up, floor=floor, limit=limit,
    )  # fmt: skip
    bound = zeros(1) if limit is not None else _bound_of(_orders(values), budget)
    greater, equal = zeros(rows), zeros(rows)
    launch(
        tally_kernel, (rows,), greater, equal, values, lists.start, lists.counts, bound, slots,
        BLOCK=CODE_BLOCK, num_warps=4,
    )  # fmt: skip
    before = equal.cumsum(0) - equal
    take = torch.minimum((budget - greater.sum() - before).clamp(min=0), equal).int()
    offsets = torch.cat([zeros(1, torch.int64), (greater + take).cumsum(0)])
    missed = zeros(1, torch.int64) if limit is not None else (lists.cut > bound).sum(0, True)
    return Found(lists, values, bound, take, offsets, missed)


def launch_topk_encode_ragged(
    x: Tensor,
    w_enc: Tensor,
    b_enc: Tensor | None,
    b_pre: Tensor | None,
    k: int,
    threshold: Tensor | None,
    precision: int,
    guess: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch on checked arguments, those of the schema."""
    with torch.no_grad(), on_device(x):
        given = operands(x, w_enc, b_enc, b_pre, precision)
        return _encode(given, k, threshold, guess)


def _encode(
    given: Operands, k: int, threshold: Tensor | None, guess: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, features, device = given.x.shape[0], given.w.shape[0], given.x.device
    budget, limit, cut = rows * k, None, None
    share = min(BATCH_SHARE * k, features)
    slots = rows * min(share + share // 4 + 64, features)
    if threshold is not None:
        limit = floats(threshold.float().clamp(min=0.0).expand(features))
        cut = torch.zeros(rows, dtype=torch.int32, device=device)
        slots = rows * min(THRESHOLD_SLOTS, features)
    elif guess is not None:
        at = guess.clamp(min=0.0).contiguous()
        cut = at.view(torch.int32).expand(rows).contiguous()
    empty = torch.empty(0, dtype=torch.int32, device=device)
    none = torch.zeros(rows + 1, dtype=torch.int64, device=device)
    if rows == 0:
        return empty.float(), empty, none, none[:1]
    packed = pack(given.x, given.minus, given.bf16), pack_dictionary(given.w, given.bf16)
    fallbacks = none[:1].clone()
    while True:
        found = _find(given, packed, budget, limit, cut, share, slots)
        fallbacks = torch.maximum(fallbacks, found.lists.state[:1] + found.missed)
        facts = (found.lists.state[1:], found.missed, found.bound.long(), found.offsets[-1:])
        needed, missed, bound, codes = torch.cat(facts).tolist()  # where the host waits
        if needed > slots:
            slots = needed
        elif missed == 0:
            break
        elif bound > 0 or cut is None:
            cut = found.bound.expand(rows).contiguous()
        else:  # too few features reach the guess to learn a bound from them
            cut = None
    values = torch.empty(codes, dtype=torch.float32, device=device)
    indices = torch.empty(codes, dtype=torch.int32, device=device)
    lists = found.lists
    launch(
        write_kernel, (rows,), values, indices, found.offsets, found.values, lists.features,
        lists.start, lists.counts, found.bound, found.take, slots, BLOCK=CODE_BLOCK, num_warps=4,
    )  # fmt: skip
    return values, indices, found.offsets, fallbacks
