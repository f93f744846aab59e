# SPDX-License-Identifier: Apache-2.0
"""``topk_encode``: the k largest features of every row.

Packed, screened (`_topk_screen`), valued exactly (`_topk_rows`), ranked: 6 launches and three for
each chunk of rows, none of which waits for the host, so that a CUDA graph can hold them. The matrix
product takes most of the time; next come the gathered dictionary rows of the candidates.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

import triton

from ._launch import launch, on_device
from ._topk_lists import Lists
from ._topk_rows import Operands, operands, order_of, pack, value
from ._topk_screen import chunk_rows, grouping, pack_dictionary, screen

# The interpreter and every GPU from sm_80 on hold these in registers.
RANK_BLOCK = 32


class Config(NamedTuple):
    """Sizes of one launch.

    Attributes:
        group: features of a group.
        lanes: groups whose maxima give the cut.
        capacity: candidates that a row may have.
        chunk: rows whose products are held at a time.
        element_size: of the dictionary: what a compiled kernel depends on besides.
    """

    group: int
    lanes: int
    capacity: int
    chunk: int
    element_size: int


def launch_config(features: int, width: int, k: int, element_size: int) -> Config:
    """Choose sizes.

    Bounds in 16 bits list 1.0 to 1.3 k features, the cut of groups 1.03 k; a row may have twice k
    and 64 before it is valued in full.

    Args:
        features: F.
        width: d.
        k: features kept a row.
        element_size: bytes of an element of the dictionary.
    """
    capacity = min(triton.next_power_of_2(2 * k + 64), triton.next_power_of_2(features))
    by = grouping(features, k)
    return Config(*by, capacity, chunk_rows(features, width), element_size)


@triton.jit
def _key(order, f):
    """Larger values first, then lower features, in one number; 2^31 features fit."""
    return (order.to(tl.int64) << 32) | (0x7FFFFFFF - f).to(tl.int64)


@triton.jit(do_not_specialize=["K", "capacity"])
def rank_kernel(
    p_out_values,  # [N, K]
    p_out_indices,  # [N, K]
    p_values,  # [N, capacity]
    p_lists,  # [N, capacity]
    p_counts,  # [N]
    K,
    capacity,
    BLOCK: tl.constexpr,
):
    """Write the K best of a row in order: a candidate's place is how many are better."""
    n = tl.program_id(0).to(tl.int64)
    count = tl.load(p_counts + n)
    p_values += n * capacity
    p_lists += n * capacity
    for i0 in range(0, tl.maximum(count, K), BLOCK):
        i = i0 + tl.arange(0, BLOCK)
        mine = i < count
        z = tl.load(p_values + i, mask=mine, other=0.0)
        f = tl.load(p_lists + i, mask=mine, other=0)
        order = order_of(z)
        key = _key(order, f)
        place = tl.zeros([BLOCK], tl.int32)
        for j0 in range(0, count, BLOCK):
            j = j0 + tl.arange(0, BLOCK)
            z_j = tl.load(p_values + j, mask=j < count, other=0.0)
            f_j = tl.load(p_lists + j, mask=j < count, other=0)
            key_j = tl.where(j < count, _key(order_of(z_j), f_j), -1)
            place += tl.sum((key_j[None, :] > key[:, None]).to(tl.int32), 1)
        place = tl.where(mine, place, i)
        active = mine & (order > 0)
        to = n * K + place
        tl.store(p_out_values + to, tl.where(active, z, 0.0), mask=place < K)
        tl.store(p_out_indices + to, tl.where(active, f, -1), mask=place < K)


def launch_topk_encode(
    x: Tensor,
    w_enc: Tensor,
    b_enc: Tensor | None,
    b_pre: Tensor | None,
    k: int,
    precision: int,
    guess: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch on checked arguments, those of the schema; the proof needs no guess."""
    with torch.no_grad(), on_device(x):
        return _encode(operands(x, w_enc, b_enc, b_pre, precision), k)


def _encode(given: Operands, k: int) -> tuple[Tensor, Tensor, Tensor]:
    rows, features, device = given.x.shape[0], given.w.shape[0], given.x.device
    values = torch.empty(rows, k, dtype=torch.float32, device=device)
    indices = torch.empty(rows, k, dtype=torch.int32, device=device)
    state = torch.zeros(2, dtype=torch.int64, device=device)
    if rows == 0:
        return values, indices, state[:1]
    config = launch_config(features, given.x.shape[1], k, given.w.element_size())
    lists = Lists(
        torch.empty(rows, config.capacity, dtype=torch.int32, device=device),
        torch.zeros(rows, dtype=torch.int32, device=device),
        torch.empty(rows, dtype=torch.int32, device=device),
        state,
        config.capacity,
    )
    packed = pack(given.x, given.minus, given.bf16), pack_dictionary(given.w, given.bf16)
    screen(given, *packed, lists, k=k)
    exact = value(given, lists.features, lists.counts, config.capacity)
    launch(
        rank_kernel, (rows,), values, indices, exact, lists.features, lists.counts,
        k, config.capacity, BLOCK=RANK_BLOCK, num_warps=4,
    )  # fmt: skip
    return values, indices, state[:1]
