# SPDX-License-Identifier: Apache-2.0
"""Reference of ``tap_``: capture statistics of a site, then steer it, driven by device tensors.

Nothing here reads a value back to the host, so the same code traces under ``torch.compile``.
Source: steering and projection removal as in TADA (arXiv 2602.11910); capture is plain moments.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Captures(NamedTuple):
    """Capture buffers after a tap; an entry is None where no buffer was given."""

    sums: Tensor | None
    squares: Tensor | None
    counts: Tensor | None
    ring: Tensor | None


def tap(
    x: Tensor,
    *,
    vectors: Tensor | None = None,
    steer_slot: Tensor | None = None,
    index: Tensor | None = None,
    strength: Tensor | None = None,
    removal: Tensor | None = None,
    steer_mask: Tensor | None = None,
    renorm: bool = False,
    sums: Tensor | None = None,
    squares: Tensor | None = None,
    counts: Tensor | None = None,
    ring: Tensor | None = None,
    capture_slot: Tensor | None = None,
    capture_mask: Tensor | None = None,
    ring_stride: int = 1,
) -> tuple[Tensor, Captures]:
    """Return the steered activations and the updated capture buffers; no argument is written.

    The formulas and shapes are those of `sidechain.ops.tap_`, which does the same in place.

    Args:
        x: activations [R, T, C], any float dtype.
        vectors: steering table [V, S, C], or None for no steering.
        steer_slot: S index of `vectors` [1] int64; outside [0, S) nothing is steered. None = 0.
        index: V index for each row of x [R] int32; outside [0, V) the row stays. None = 0.
        strength: a [R]. None = 0.
        removal: b [R]. None = 0.
        steer_mask: tokens to steer [R | 1, T] bool. None = all.
        renorm: keep the norm of every steered token.
        sums: token sums [S, R, C].
        squares: token sums of squares [S, R, C].
        counts: token counts [S, R].
        ring: token copies [S, R, ceil(T / ring_stride), C], any float dtype.
        capture_slot: S index to write [1] int64; outside [0, S) nothing is captured. None = 0.
        capture_mask: tokens to capture [R | 1, T] bool. None = all.
        ring_stride: distance of the tokens copied to `ring`.

    Returns:
        y [R, T, C], dtype of x, and the updated `Captures`.

    Differentiable in: x, vectors, strength, removal. Accumulates in float32 (float64 where x or
    the buffer is float64).
    """
    captures = capture(x, sums, squares, counts, ring, capture_slot, capture_mask, ring_stride)
    y = _steered(x, vectors, steer_slot, index, strength, removal, steer_mask, renorm)
    return y, captures


def tap_(
    x: Tensor,
    vectors: Tensor | None = None,
    steer_slot: Tensor | None = None,
    index: Tensor | None = None,
    strength: Tensor | None = None,
    removal: Tensor | None = None,
    steer_mask: Tensor | None = None,
    renorm: bool = False,
    sums: Tensor | None = None,
    squares: Tensor | None = None,
    counts: Tensor | None = None,
    ring: Tensor | None = None,
    capture_slot: Tensor | None = None,
    capture_mask: Tensor | None = None,
    ring_stride: int = 1,
) -> None:
    """Do the same as `tap`, writing x and the capture buffers in place."""
    capture_(x, sums, squares, counts, ring, capture_slot, capture_mask, ring_stride)
    if vectors is not None:
        x.copy_(_steered(x, vectors, steer_slot, index, strength, removal, steer_mask, renorm))


def capture(
    x: Tensor,
    sums: Tensor | None,
    squares: Tensor | None,
    counts: Tensor | None,
    ring: Tensor | None,
    capture_slot: Tensor | None,
    capture_mask: Tensor | None,
    ring_stride: int,
) -> Captures:
    """Return the capture buffers of `tap` after x [R, T, C]; no argument is written."""
    buffers = (sums, squares, counts, ring)
    updates = _captured(x, *buffers, capture_slot, capture_mask, ring_stride)
    new: list[Tensor | None] = [None] * len(buffers)
    for n, (buffer, update) in enumerate(zip(buffers, updates, strict=True)):
        if buffer is not None and update is not None:
            new[n] = buffer.index_copy(0, _slot(capture_slot, buffer)[1], update)
    return Captures(*new)


def capture_(
    x: Tensor,
    sums: Tensor | None,
    squares: Tensor | None,
    counts: Tensor | None,
    ring: Tensor | None,
    capture_slot: Tensor | None,
    capture_mask: Tensor | None,
    ring_stride: int,
) -> None:
    """Do the same as `capture`, writing the buffers in place."""
    buffers = (sums, squares, counts, ring)
    updates = _captured(x, *buffers, capture_slot, capture_mask, ring_stride)
    for buffer, update in zip(buffers, updates, strict=True):
        if buffer is not None and update is not None:
            buffer.index_copy_(0, _slot(capture_slot, buffer)[1], update)


def _steered(
    x: Tensor,
    vectors: Tensor | None,
    steer_slot: Tensor | None,
    index: Tensor | None,
    strength: Tensor | None,
    removal: Tensor | None,
    steer_mask: Tensor | None,
    renorm: bool,
) -> Tensor:
    if vectors is None or (strength is None and removal is None) or x.numel() == 0:
        return x
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = x.shape[0]
    valid, slot = _slot(steer_slot, vectors, dim=1)
    table = vectors.index_select(1, slot)[:, 0].to(acc)  # [V, C]
    if index is None:
        v = table[:1].expand(rows, -1)  # [R, C]
        touched = valid.expand(rows)  # [R]
    else:
        v = table.index_select(0, index.clamp(0, table.shape[0] - 1))
        touched = valid & (index >= 0) & (index < table.shape[0])
    v = v[:, None]  # [R, 1, C]
    zero = torch.zeros((), dtype=acc, device=x.device)
    a = zero.expand(rows) if strength is None else strength.to(acc)
    b = zero.expand(rows) if removal is None else removal.to(acc)
    touched = touched & ((a != 0) | (b != 0))

    xf = x.to(acc)
    scale = a[:, None, None]  # [R, 1, 1]
    if removal is not None:
        xv = (xf * v).sum(-1, keepdim=True)  # [R, T, 1]
        # b = 0 must not meet an infinite projection: 0 * inf is NaN.
        removed = torch.where(b[:, None, None] == 0, zero, b[:, None, None] * xv.clamp(min=0))
        scale = scale - removed
    y = xf + scale * v
    if renorm:
        norm_x = torch.linalg.vector_norm(xf, dim=-1, keepdim=True)
        norm_y = torch.linalg.vector_norm(y, dim=-1, keepdim=True)
        # The inner where keeps 0 / 0 out of the gradient as well.
        y = y * torch.where(norm_y == 0, 1.0, norm_x / torch.where(norm_y == 0, 1.0, norm_y))
    written = touched[:, None] if steer_mask is None else touched[:, None] & steer_mask  # [R, T|1]
    return torch.where(written[..., None], y.to(x.dtype), x)


def _captured(
    x: Tensor,
    sums: Tensor | None,
    squares: Tensor | None,
    counts: Tensor | None,
    ring: Tensor | None,
    capture_slot: Tensor | None,
    capture_mask: Tensor | None,
    ring_stride: int,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """New contents [1, R, ...] of the addressed slot of each buffer."""
    rows, tokens, _ = x.shape
    mask = None if capture_mask is None else capture_mask.expand(rows, tokens)[..., None]

    def add(buffer: Tensor | None, power: int) -> Tensor | None:
        if buffer is None:
            return None
        valid, slot = _slot(capture_slot, buffer)
        old = buffer.index_select(0, slot)
        if power == 0:
            n = torch.full((rows,), float(tokens), dtype=old.dtype, device=x.device)
            total = n if mask is None else mask[..., 0].sum(1, dtype=old.dtype)
        else:
            xf = x.to(torch.promote_types(x.dtype, old.dtype))
            xf = xf if power == 1 else xf.square()
            xf = xf if mask is None else torch.where(mask, xf, 0.0)
            total = xf.sum(1).to(old.dtype)
        return torch.where(valid, old + total, old)

    copied = None
    if ring is not None:
        valid, slot = _slot(capture_slot, ring)
        copied = x[:, ::ring_stride].to(ring.dtype)[None]
        keep = valid if mask is None else valid & mask[:, ::ring_stride]
        copied = torch.where(keep, copied, ring.index_select(0, slot))
    return add(sums, 1), add(squares, 2), add(counts, 0), copied


def _slot(slot: Tensor | None, buffer: Tensor, dim: int = 0) -> tuple[Tensor, Tensor]:
    """Whether the slot [1] lies inside `buffer`, and the slot clamped into it."""
    if slot is None:
        slot = torch.zeros(1, dtype=torch.int64, device=buffer.device)
    size = buffer.shape[dim]
    return (slot >= 0) & (slot < size), slot.clamp(0, size - 1)
