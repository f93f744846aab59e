# SPDX-License-Identifier: Apache-2.0
"""``attention_tap``: attention to a short context per row, its output captured in the epilogue.

One program owns BLOCK_T tokens of one head of one row: it walks the context with a running softmax
(scores never leave the chip), writes its tile of the output, and reduces the tile over its tokens.
Tiles of one head lie next to each other in the grid, so keys and values come from L2 for all but
the first. Moved: q once in, out once, 8 BLOCK_D bytes of partial sums per tile. Short contexts are
bound by memory, contexts above about 200 tokens by the matrix units.

Sums are reproducible without a second launch: every tile writes its partial sums, and whichever
tile of a head arrives last adds all of them in the order of the tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

import triton

from ._launch import launch, on_device

LOG2_E = 1.4426950408889634


class Config(NamedTuple):
    """Compile-time settings of one launch."""

    block_t: int
    block_s: int
    block_d: int
    num_warps: int
    num_stages: int
    registers: int | None  # of a thread at most; None leaves it to ptxas


def launch_config(tokens: int, context: int, width: int, element_size: int, masked: bool) -> Config:
    """Choose tiles that fit the shared memory of every GPU from sm_80 on, without spilling.

    Args:
        tokens: T.
        context: S.
        width: D, at most 128.
        element_size: bytes of an element of q.
        masked: whether there is a context mask.
    """
    block_d = max(16, triton.next_power_of_2(width))
    if element_size == 4:
        # Products of float32 run on the vector units and hold their operands in registers.
        block_s = 32 if 16 < block_d < 128 else 16
        few = tokens <= 16
        return Config(16 if few else 32, block_s, block_d, 4, 2, 255 if few else None)
    block_t = min(128, max(16, triton.next_power_of_2(tokens)))
    # The mask of 64 context tokens beside 128 x 128 accumulators spills on sm_80.
    block_s = 32 if context <= 32 or (masked and block_d == 128) else 64
    # For small tiles ptxas 12.8 stops at a number of registers that spills, far from the limit.
    registers = 255 if block_t <= 32 else None
    return Config(block_t, block_s, block_d, 8 if block_t * block_d > 8192 else 4, 2, registers)


@triton.jit
def _add_to_slot(p_buffer, slots, stride_slot, stride_row, slot, row, offsets, mask, value):
    """Add value to buffer[slot, row, offsets] if the buffer has that slot."""
    if (slot >= 0) & (slot < slots):
        at = p_buffer + slot * stride_slot + row * stride_row + offsets
        tl.store(at, tl.load(at, mask=mask) + value, mask=mask)


@triton.jit
def _count_tokens(p_mask, T, BLOCK: tl.constexpr):
    """Tokens that a mask holds; T without a mask."""
    total = 0
    if p_mask is None:
        total += T
    else:
        for t0 in range(0, T, BLOCK):
            t = t0 + tl.arange(0, BLOCK)
            total += tl.sum((tl.load(p_mask + t, mask=t < T, other=0) != 0).to(tl.int32), 0)
    return total.to(tl.float32)


_SIZES = ["T", "S", "M", "H", "GROUP"]
_SLOTS = ["sums_slots", "squares_slots", "counts_slots", "ring_slots"]


@triton.jit(do_not_specialize=[*_SIZES, *_SLOTS])
def attention_tap_kernel(
    p_out,  # [R, T, H, D] contiguous
    p_q,  # [R, T, H, D]
    p_k,  # [M, S, H // GROUP, D]
    p_v,  # [M, S, H // GROUP, D]
    p_index,  # [R] or None
    p_context_mask,  # [M, S] bytes or None
    p_sums,  # [slots, R, H D] or None
    p_squares,  # [slots, R, H D] or None
    p_counts,  # [slots, R] or None
    p_ring,  # [slots, R, T, H D] or None
    p_slot,  # [1] or None
    p_capture_mask,  # [R or 1, T] bytes or None
    p_partials,  # [R, H, tiles, 2, BLOCK_D], None where one tile holds all tokens
    p_arrivals,  # [R, H] zeros, left as zeros; likewise
    scale_log2,  # factor of the scores times log2(e)
    T,
    S,
    M,
    H,
    GROUP,
    q_row,  # these nine count UNIT elements, so that the compiler knows what they are multiples of
    q_token,
    q_head,
    k_context,
    k_token,
    k_head,
    v_context,
    v_token,
    v_head,
    sums_slots,
    sums_slot,
    sums_row,
    squares_slots,
    squares_slot,
    squares_row,
    counts_slots,
    counts_slot,
    counts_row,
    ring_slots,
    ring_slot,
    ring_row,
    ring_token,
    mask_row,
    D: tl.constexpr,
    UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Attend with one tile of BLOCK_T queries and capture what comes out."""
    tiles = tl.cdiv(T, BLOCK_T)
    pid = tl.program_id(0)
    tile = pid % tiles
    row_head = pid // tiles
    # Divided in 32 bits, which needs no call; addresses are formed in 64.
    h = (row_head % H).to(tl.int64)
    kv_head = (row_head % H // GROUP).to(tl.int64)
    r = (row_head // H).to(tl.int64)
    row_head = row_head.to(tl.int64)
    t = (tile * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)  # [BT]
    d = tl.arange(0, BLOCK_D)  # [BD]
    in_d = d < D
    in_t = t < T
    in_tile = in_t[:, None] & in_d[None, :]

    context = tl.zeros((), tl.int64)
    if p_index is not None:
        context += tl.load(p_index + r)
    live = (context >= 0) & (context < M)

    p_q += (r * q_row + h * q_head) * UNIT
    p_k += (context * k_context + kv_head * k_head) * UNIT
    p_v += (context * v_context + kv_head * v_head) * UNIT
    b_q = tl.load(p_q + t[:, None] * (q_token * UNIT) + d[None, :], mask=in_tile, other=0.0)

    m = tl.full([BLOCK_T], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    acc = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for s0 in range(0, tl.where(live, S, 0), BLOCK_S):
        s = (s0 + tl.arange(0, BLOCK_S)).to(tl.int64)  # [BS]
        read = s < S
        if p_context_mask is not None:
            read &= tl.load(p_context_mask + context * S + s, mask=read, other=0) != 0
        in_block = read[:, None] & in_d[None, :]
        b_k = tl.load(p_k + s[:, None] * (k_token * UNIT) + d[None, :], mask=in_block, other=0.0)
        b_v = tl.load(p_v + s[:, None] * (v_token * UNIT) + d[None, :], mask=in_block, other=0.0)
        scores = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale_log2  # [BT, BS]
        scores = tl.where(read[None, :], scores, float("-inf"))
        m_new = tl.maximum(m, tl.max(scores, 1))
        # A context without a token so far leaves -inf, and -inf - -inf would be NaN.
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
        kept = tl.exp2(m - base)
        p = tl.exp2(scores - base[:, None])
        total = total * kept + tl.sum(p, 1)
        acc = tl.dot(p.to(b_v.dtype), b_v, acc * kept[:, None], input_precision=PRECISION)
        m = m_new
    # Nothing read: 0 * 1. A NaN total is not 0 and stays NaN.
    out = acc * (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]
    p_out += (r * T * H + h) * D
    tl.store(p_out + t[:, None] * H * D + d[None, :], out, mask=in_tile)

    slot = tl.zeros((), tl.int64)
    if p_slot is not None:
        slot += tl.load(p_slot)
    captured = in_t
    if p_capture_mask is not None:
        p_capture_mask += r * mask_row
        captured &= tl.load(p_capture_mask + t, mask=in_t, other=0) != 0
    if p_ring is not None:
        if (slot >= 0) & (slot < ring_slots):
            at = p_ring + slot * ring_slot + r * ring_row + h * D
            at = at + t[:, None] * ring_token + d[None, :]
            tl.store(at, out, mask=captured[:, None] & in_d[None, :])
    if p_counts is not None:
        if (h == 0) & (tile == 0):
            n = _count_tokens(p_capture_mask, T, BLOCK_T)
            _add_to_slot(p_counts, counts_slots, counts_slot, counts_row, slot, r, 0, None, n)
    if p_sums is not None or p_squares is not None:
        # A masked NaN must not reach the sums.
        out = tl.where(captured[:, None], out, 0.0)
        b_sums = tl.sum(out, 0)  # [BD]
        b_squares = tl.sum(out * out, 0)
        last = True
        if p_partials is not None:
            p_head = p_partials + row_head * tiles * (2 * BLOCK_D) + d
            tl.store(p_head + tile * (2 * BLOCK_D), b_sums)
            if p_squares is not None:
                tl.store(p_head + tile * (2 * BLOCK_D) + BLOCK_D, b_squares)
            # All threads have written before one of them announces it.
            tl.debug_barrier()
            last = tl.atomic_add(p_arrivals + row_head, 1, sem="acq_rel") == tiles - 1
            if last:
                b_sums = tl.zeros([BLOCK_D], tl.float32)
                b_squares = tl.zeros([BLOCK_D], tl.float32)
                for n in range(0, tiles):
                    at = p_head + n * (2 * BLOCK_D)
                    b_sums += tl.load(at, cache_modifier=".cg")
                    if p_squares is not None:
                        b_squares += tl.load(at + BLOCK_D, cache_modifier=".cg")
                tl.store(p_arrivals + row_head, 0)
        if last:
            c = h * D + d
            if p_sums is not None:
                _add_to_slot(p_sums, sums_slots, sums_slot, sums_row, slot, r, c, in_d, b_sums)
            if p_squares is not None:
                _add_to_slot(
                    p_squares, squares_slots, squares_slot, squares_row, slot, r, c, in_d, b_squares
                )


_arrivals: dict[tuple[int, int], Tensor] = {}


def arrival_counters(n: int, device: torch.device) -> Tensor:
    """At least n int32 zeros, which every kernel leaves as zeros, so that none clears them first.

    Kept per stream, because launches on one stream do not overlap. Memory taken while a graph is
    captured belongs to the graph and is not kept.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(n, dtype=torch.int32, device=device)
    key = (device.index, torch.cuda.current_stream(device).cuda_stream)
    kept = _arrivals.get(key)
    if kept is None or kept.numel() < n:
        kept = torch.zeros(max(4096, n), dtype=torch.int32, device=device)
        _arrivals[key] = kept
    return kept


def _unit(*strides: int) -> int:
    """Largest power of two up to 16 that divides every stride."""
    unit = 16
    while any(s % unit for s in strides):
        unit //= 2
    return unit


def _bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)


def _strides(buffer: Tensor | None, dims: int) -> tuple[int, ...]:
    """Number of slots and the first strides of a capture buffer."""
    return (0,) * (dims + 1) if buffer is None else (buffer.shape[0], *buffer.stride()[:dims])


def launch_attention_tap(
    out: Tensor,
    q: Tensor,
    k_bank: Tensor,
    v_bank: Tensor,
    context_index: Tensor | None,
    context_mask: Tensor | None,
    scale: float | None,
    sums: Tensor | None,
    squares: Tensor | None,
    counts: Tensor | None,
    ring: Tensor | None,
    capture_slot: Tensor | None,
    capture_mask: Tensor | None,
) -> None:
    """Launch on checked arguments, those of `sidechain.ops.attention_tap`."""
    rows, tokens, heads, width = q.shape
    masked = context_mask is not None
    config = launch_config(tokens, k_bank.shape[1], width, q.element_size(), masked)
    tiles = triton.cdiv(tokens, config.block_t)
    if rows == 0 or tokens == 0:
        return
    pooled = sums is not None or squares is not None
    partials = arrivals = None
    if pooled and tiles > 1:
        shape = (rows, heads, tiles, 2, config.block_d)
        partials = torch.empty(shape, dtype=torch.float32, device=q.device)
        arrivals = arrival_counters(rows * heads, q.device)
    strides = (*q.stride()[:3], *k_bank.stride()[:3], *v_bank.stride()[:3])
    unit = _unit(*strides)
    shared_mask = capture_mask is None or capture_mask.shape[0] == 1
    scale = width**-0.5 if scale is None else scale
    with on_device(q):
        launch(
            attention_tap_kernel,
            (rows * heads * tiles,),
            out,
            q,
            k_bank,
            v_bank,
            None if context_index is None else context_index.contiguous(),
            _bytes(context_mask),
            sums,
            squares,
            counts,
            ring,
            capture_slot,
            _bytes(capture_mask),
            partials,
            arrivals,
            scale * LOG2_E,
            tokens,
            k_bank.shape[1],
            k_bank.shape[0],
            heads,
            heads // k_bank.shape[2],
            *(s // unit for s in strides),
            *_strides(sums, 2),
            *_strides(squares, 2),
            *_strides(counts, 2),
            *_strides(ring, 3),
            0 if shared_mask else tokens,
            D=width,
            UNIT=unit,
            PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
            BLOCK_T=config.block_t,
            BLOCK_S=config.block_s,
            BLOCK_D=config.block_d,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            maxnreg=config.registers,
        )
