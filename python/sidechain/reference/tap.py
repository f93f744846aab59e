# SPDX-License-Identifier: Apache-2.0
"""Reference of ``tap_``: capture statistics of a site, then steer it, driven by device tensors.

Nothing here reads a value back to the host, so the same code traces under ``torch.compile``.
Source: steering and projection removal as in TADA (arXiv 2602.11910); capture is plain
sums and sums of squares.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .tap_structs import Capture, Steering


def tap(
    x: Tensor, capture: Capture | None = None, steering: Steering | None = None
) -> tuple[Tensor, Capture]:
    """Return the steered activations and the updated capture buffers; no argument is written.

    The formulas and shapes are those of `Capture` and `Steering`; `sidechain.ops.tap_` does the
    same in place.

    Args:
        x: activations [R, T, C], any float dtype.
        capture: buffers to update, which see x before it is steered. None = no capture.
        steering: what to add. None = no steering.

    Returns:
        y [R, T, C], dtype of x, and the capture with its new buffers.

    Differentiable in: x, and vectors, strength and removal of steering. Accumulates in float32
    (float64 where x or the buffer is float64).
    """
    return _steered(x, steering), captured(x, capture or Capture())


def tap_(x: Tensor, capture: Capture | None = None, steering: Steering | None = None) -> None:
    """Do the same as `tap`, writing x and the capture buffers in place."""
    if capture is not None:
        capture_(x, capture)
    if steering is not None:
        x.copy_(_steered(x, steering))


def captured(x: Tensor, capture: Capture) -> Capture:
    """Return a capture whose buffers have seen x [R, T, C]; no argument is written."""
    new = {
        name: buffer.index_copy(0, _slot(capture.slot, buffer)[1], update)
        for name, buffer, update in _updates(x, capture)
    }
    return capture._replace(**new)


def capture_(x: Tensor, capture: Capture) -> None:
    """Do the same as `captured`, writing the buffers in place."""
    for _, buffer, update in _updates(x, capture):
        buffer.index_copy_(0, _slot(capture.slot, buffer)[1], update)


def _steered(x: Tensor, steering: Steering | None) -> Tensor:
    if steering is None or x.numel() == 0:
        return x
    vectors, steer_slot, index, strength, removal, mask, renorm = steering
    if strength is None and removal is None:
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
    # A row at 0 keeps its value below too; taken out here, it could never be trained away from 0.
    trained = torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)
    if not trained:
        touched = touched & ((a != 0) | (b != 0))

    xf = x.to(acc)
    scale = a[:, None, None]  # [R, 1, 1]
    if removal is not None:
        xv = (xf * v).sum(-1, keepdim=True)  # [R, T, 1]
        removed = b[:, None, None] * xv.clamp(min=0)
        if not trained:  # b = 0 must not meet an infinite projection: 0 * inf is NaN.
            removed = torch.where(b[:, None, None] == 0, zero, removed)
        scale = scale - removed
    y = xf + scale * v
    if renorm:
        norm_x = torch.linalg.vector_norm(xf, dim=-1, keepdim=True)
        norm_y = torch.linalg.vector_norm(y, dim=-1, keepdim=True)
        # The inner where keeps 0 / 0 out of the gradient as well.
        y = y * torch.where(norm_y == 0, 1.0, norm_x / torch.where(norm_y == 0, 1.0, norm_y))
    written = touched[:, None] if mask is None else touched[:, None] & mask  # [R, T|1]
    return torch.where(written[..., None], y.to(x.dtype), x)


def _updates(x: Tensor, capture: Capture) -> list[tuple[str, Tensor, Tensor]]:
    """Return (field, buffer, new contents [1, R, ...] of the addressed slot) of each buffer."""
    rows, tokens, _ = x.shape
    mask = None if capture.mask is None else capture.mask.expand(rows, tokens)[..., None]
    found = []
    for name, power in (("sums", 1), ("squares", 2), ("counts", 0), ("ring", None)):
        buffer: Tensor | None = getattr(capture, name)
        if buffer is None:
            continue
        valid, slot = _slot(capture.slot, buffer)
        old = buffer.index_select(0, slot)
        if power is None:
            keep = valid if mask is None else valid & mask
            new = torch.where(keep, x.to(old.dtype)[None], old)
        elif power == 0:
            n = torch.full((rows,), float(tokens), dtype=old.dtype, device=x.device)
            total = n if mask is None else mask[..., 0].sum(1, dtype=old.dtype)
            new = torch.where(valid, old + total, old)
        else:
            xf = x.to(torch.promote_types(x.dtype, old.dtype))
            xf = xf if power == 1 else xf.square()
            xf = xf if mask is None else torch.where(mask, xf, 0.0)
            new = torch.where(valid, old + xf.sum(1).to(old.dtype), old)
        found.append((name, buffer, new))
    return found


def _slot(slot: Tensor | None, buffer: Tensor, dim: int = 0) -> tuple[Tensor, Tensor]:
    """Return whether the slot [1] lies inside `buffer`, and the slot clamped into it."""
    if slot is None:
        slot = torch.zeros(1, dtype=torch.int64, device=buffer.device)
    size = buffer.shape[dim]
    return (slot >= 0) & (slot < size), slot.clamp(0, size - 1)
