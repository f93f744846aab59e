# SPDX-License-Identifier: Apache-2.0
"""The screen of ``topk_encode``: which features of a row may belong to its codes.

cuBLAS multiplies packed rows by the packed dictionary, a chunk of rows at a time, into a scratch
buffer made to stay in the second-level cache. `maxima_kernel` reads it once and keeps the largest
product of every group of GROUP consecutive features; the kernels of `_topk_lists` find the cut from
these, and go back only to the groups that reach it. README.md has the inequality behind it: the
screen decides by proof, not by chance.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

import triton

from ._launch import launch
from ._topk_full import FULL_PROGRAMS, full_kernel
from ._topk_lists import Lists, list_kernel, pool_kernel
from ._topk_rows import VALUE_BLOCK, VALUE_ROWS, Operands, Packed, accumulated, pack, products

# Second-level cache of an H100, and what the products held at a time may take of it.
L2_BYTES = 50 << 20
CHUNK_BYTES = 32 << 20
# Enough rows for the matrix units to outrun the memory that the dictionary is read from.
LEAST_ROWS = 512
# Groups of features for each of the k largest, so that few groups hold two of them.
SPREAD = 8
MOST_LANES = 4096
# What a program of `maxima_kernel` reads at a time. Dictionaries are padded to whole tiles, so that
# loads need no masks, and as many groups of any size follow from them as fill 16 bytes.
TILE_ROWS, TILE_FEATURES, TILE_WARPS = 8, 256, 2
TILE_PIECES = 16  # programs that share the features of a row: 1,024 for the rows of a chunk
GROUP_BLOCK = 64
LISTED = 512  # features that a list kernel looks at together


class Grouping(NamedTuple):
    """How the features of a dictionary are grouped.

    Attributes:
        size: consecutive features of a group.
        lanes: groups whose bounds a list kernel handles together; the cut comes from as many.
    """

    size: int
    lanes: int


def chunk_rows(features: int, width: int) -> int:
    """Rows whose products are held at a time: beside the dictionary in L2 if both have room."""
    room = min(CHUNK_BYTES, L2_BYTES - 2 * features * width)
    return max(LEAST_ROWS, room // (4 * max(features, 1)) // 128 * 128)


def grouping(features: int, k: int) -> Grouping:
    """Choose the largest groups that leave SPREAD of them for each of the k largest."""
    wanted = min(MOST_LANES, _pow2(SPREAD * k))
    size = next((n for n in (16, 4) if features >= wanted * n), 1)
    groups = triton.cdiv(features, TILE_FEATURES) * TILE_FEATURES // size
    return Grouping(size, min(max(16, _pow2(groups)), max(512, wanted)))


def _pow2(n: int) -> int:
    return int(triton.next_power_of_2(max(n, 1)))


@triton.jit
def groups_kernel(
    p_groups,  # [4, GROUPS]
    p_w,  # bounds [3, PADDED]
    p_bias,  # [F] or None
    p_limit,  # [F] or None
    F,
    PADDED,
    GROUPS,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Bounds of each group: its largest length, loss and size of a bias, and its least limit."""
    g = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_g = g < GROUPS
    f = g[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    read = f < PADDED
    length = tl.max(tl.load(p_w + PADDED + f, mask=read, other=0.0), 1)
    lost = tl.max(tl.load(p_w + 2 * PADDED + f, mask=read, other=0.0), 1)
    tl.store(p_groups + g, length, mask=in_g)
    tl.store(p_groups + GROUPS + g, lost, mask=in_g)
    if p_bias is not None:
        size = tl.abs(tl.load(p_bias + f, mask=f < F, other=0.0))
        size = tl.where(size != size, float("inf"), size)
        tl.store(p_groups + 2 * GROUPS + g, tl.max(size, 1), mask=in_g)
    if p_limit is not None:
        limit = tl.load(p_limit + f, mask=f < F, other=float("inf"))
        limit = tl.where(limit != limit, float("-inf"), limit)  # which no value fails to exceed
        tl.store(p_groups + 3 * GROUPS + g, tl.min(limit, 1), mask=in_g)


@triton.jit(do_not_specialize=["first", "count"])
def maxima_kernel(
    p_maxima,  # [rows of the chunk, GROUPS]
    p_products,  # [rows of the chunk, PADDED]
    p_x,  # bounds [3, N]: the units are read
    p_w,  # bounds [3, PADDED]: likewise
    p_bias,  # [F] or None
    first,  # row of the batch that the chunk starts with
    count,  # rows of the chunk
    F,
    PADDED,
    GROUPS,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Find what the screen says is the largest value of each group, ROWS rows at a time.

    Moved: 4 bytes a product, 8 / ROWS of the dictionary's and 4 / GROUP out; bound by the first.
    """
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_n = n < count
    n = tl.minimum(n, count - 1)  # rows past the end repeat the last, so that loads need no mask
    x_unit = tl.load(p_x + first + n)[:, None]
    p_z = p_products + (n.to(tl.int64) * PADDED)[:, None]
    p_out = p_maxima + (n.to(tl.int64) * GROUPS)[:, None]
    for f0 in range(tl.program_id(1) * BLOCK, PADDED, tl.num_programs(1) * BLOCK):
        f = (f0 + tl.arange(0, BLOCK))[None, :]
        s = tl.load(p_z + f) * x_unit * tl.load(p_w + f)
        if p_bias is not None:
            s += tl.load(p_bias + f, mask=f < F, other=0.0)
        top = tl.max(tl.reshape(s, [ROWS, BLOCK // GROUP, GROUP]), 2)
        g = (f0 // GROUP + tl.arange(0, BLOCK // GROUP))[None, :]
        tl.store(p_out + g, top, mask=in_n[:, None])


def pack_dictionary(w: Tensor, bf16: bool) -> Packed:
    """Pack a dictionary [F, d] for `screen`, with zeros up to whole tiles."""
    return pack(w, None, bf16, unit=TILE_FEATURES)


def screen(
    given: Operands,
    x: Packed,
    w: Packed,
    lists: Lists,
    *,
    k: int,
    ranked: bool = True,
    limit: Tensor | None = None,
) -> None:
    """Fill the lists with all features that may belong to the codes."""
    rows, features, padded = x.codes.shape[0], given.w.shape[0], w.codes.shape[0]
    by, device = grouping(features, k), x.codes.device
    chunk, groups = min(rows, chunk_rows(features, x.codes.shape[1])), padded // by.size
    products_of = torch.empty(chunk, padded, dtype=torch.float32, device=device)
    maxima = torch.empty(chunk, groups, dtype=torch.float32, device=device)
    visits = torch.empty(chunk, groups, dtype=torch.int32, device=device)
    bounds = torch.empty(4, groups, dtype=torch.float32, device=device)
    share = accumulated(x.codes.shape[1])
    launch(
        groups_kernel, (triton.cdiv(groups, GROUP_BLOCK),),
        bounds, w.bounds, given.bias, limit, features, padded, groups,
        GROUP=by.size, BLOCK=GROUP_BLOCK, num_warps=4,
    )  # fmt: skip
    pieces = min(TILE_PIECES, padded // TILE_FEATURES)
    sizes = {
        "GROUP": by.size, "LANES": by.lanes, "VISITS": LISTED // by.size,
        "num_warps": 1 if by.lanes <= 1024 else 4 if by.lanes <= 2048 else 8,
    }  # fmt: skip
    for first in range(0, rows, chunk):
        count = min(chunk, rows - first)
        products(x.codes[first : first + count], w.codes, products_of[:count])
        launch(
            maxima_kernel, (triton.cdiv(count, TILE_ROWS), pieces),
            maxima, products_of, x.bounds, w.bounds, given.bias, first, count, features, padded,
            groups, GROUP=by.size, ROWS=TILE_ROWS, BLOCK=TILE_FEATURES, num_warps=TILE_WARPS,
        )  # fmt: skip
        screened = (
            visits, products_of, maxima, bounds, x.bounds, w.bounds, given.bias,
        )  # fmt: skip
        numbers = (share, first, rows, features, padded, groups, k, lists.capacity)
        if lists.start is None:
            launch(
                list_kernel, (count,), lists.features, lists.counts, lists.failed, lists.state,
                *screened, *numbers, **sizes,
            )  # fmt: skip
        else:
            launch(
                pool_kernel, (count,), lists.features, lists.low, lists.up, lists.counts,
                lists.start, lists.cut, lists.failed, lists.state, *screened, limit, *numbers,
                RANKED=ranked, **sizes,
                maxnreg=255,  # left alone, the ptxas of Triton 3.9 stops at 168 and spills
            )  # fmt: skip
    programs = min(rows, FULL_PROGRAMS)
    launch(
        full_kernel, (programs,), lists.features, lists.low, lists.up, lists.counts, lists.start,
        lists.cut, lists.failed, lists.state,
        torch.empty(programs, features, dtype=torch.float32, device=device),
        limit, given.x, given.minus, given.w, given.bias, given.x.stride(0), given.w.stride(0),
        features, given.x.shape[1], k, lists.capacity,
        RANKED=ranked, POOL=lists.start is not None, BF16=given.bf16,
        LANES=min(1024, by.lanes), ROWS=VALUE_ROWS, BLOCK=VALUE_BLOCK, num_warps=4,
        maxnreg=255,  # one program for each multiprocessor: nothing to gain from using fewer
    )  # fmt: skip
