# SPDX-License-Identifier: Apache-2.0
"""What taps do at a site: operations on its context, its attention and its output."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..ops import Capture, Steering, tap_
from ..pipelines import GenerationTracker
from ..reference.tap import tap as reference_tap
from .layout import Expected
from .masks import as_mask, readable


class Operation:
    """What one tap does at one site; its tensors are filled by the tap.

    Attributes:
        fired: how often the site has run in the denoiser call.
        tracker: of the tap.
        expected: output of the site in this generation; None = not known.
    """

    def __init__(self) -> None:
        self.fired = 0
        self.tracker: GenerationTracker | None = None
        self.expected: Expected | None = None

    def mark(self) -> bool:
        """Note that the site runs; tell whether for the first time, not as a recomputation.

        Raises:
            RuntimeError: a gradient checkpoint is computed again with other buffers.
        """
        if torch.compiler.is_compiling():
            # Only written, never read: no guard on it.
            self.fired = 1
            return True
        self.fired += 1
        if self.tracker is None or torch._C._current_graph_task_id() == -1:
            return True
        self.tracker.recomputed()  # within a backward pass
        return False


def _kept(buffer: Tensor) -> Tensor:
    """Return a buffer that autograd may keep: a later step writes the one of the tap."""
    return buffer.clone() if torch.is_grad_enabled() else buffer


class ContextRecord(Operation):
    """Copies the cross-attention context, and which of its tokens may be read, into rings."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: slice | None = None
        self.buffers = Capture()
        self.mask: Tensor | None = None  # [slots + 1, R, S] bool; the last for what is not kept
        self.masked = False

    def __call__(self, context: Tensor, mask: Tensor | None) -> None:
        """Copy the context; changes nothing."""
        ring = self.buffers.ring
        if not self.mark() or ring is None:
            return
        rows = slice(None) if self.rows is None else self.rows
        x = context.detach()
        if x.shape[0] == 1 < ring.shape[1]:  # one context for all rows
            x = x.expand(ring.shape[1], -1, -1)
        tap_(x[rows], self.buffers)
        if mask is not None and self.mask is not None and self.buffers.slot is not None:
            self.masked = True
            slot = self.buffers.slot
            last = self.mask.shape[0] - 1
            place = torch.where((slot < 0) | (slot >= last), last, slot)
            self.mask.index_copy_(0, place, readable(mask)[rows][None])


class Swap(Operation):
    """Gives selected rows another context, for keys, values or both."""

    mask: Tensor | None = None  # [R, S] bool, tokens of the bank that may be read; None = all
    partial = False  # whether it leaves tokens out

    def __init__(self, key: bool, value: bool) -> None:
        super().__init__()
        self.key, self.value = key, value
        self.selected: Tensor  # [R, 1, 1] bool
        self.bank: Tensor  # [R, S, C]
        self.live: Callable[[], Tensor] | None = None  # the bank, where a gradient is wanted for it

    def __call__(self, context: Tensor) -> Tensor:
        """Return the context with the selected rows exchanged."""
        self.mark()
        live = self.live if torch.is_grad_enabled() else None
        return torch.where(_kept(self.selected), self.bank if live is None else live(), context)

    def of_mask(self, mask: Tensor | None) -> Tensor | None:
        """Return the mask of the attention with the selected rows exchanged.

        Raises:
            ValueError: the attention reads a mask and the bank has none, or the other way round.
        """
        if mask is None:
            if self.partial:
                raise ValueError(
                    "patch: expected a context without a mask [this cross-attention reads all of "
                    "it], got one that leaves tokens out"
                )
            return None
        if self.mask is None:
            raise ValueError(
                "patch: expected a context with its mask [this cross-attention reads one: "
                "context=contexts(..., masks=True)], got the context alone"
            )
        return torch.where(
            self.selected[:, 0], as_mask(self.mask, mask).flatten(1), mask.flatten(1)
        ).view_as(mask)


class Replace(Operation):
    """Gives selected rows another output."""

    def __init__(self) -> None:
        super().__init__()
        self.selected: Tensor  # [R, 1, 1] bool
        self.slot: Tensor  # [1] int64, within the bank
        self.bank: Tensor  # [S, R, T, C]
        # The entry of the bank [R, T, C] of this step, where a gradient is wanted for it.
        self.live: Callable[[], Tensor] | None = None

    def __call__(self, out: Tensor) -> Tensor:
        """Return the output with the selected rows exchanged."""
        self.mark()
        live = self.live if torch.is_grad_enabled() else None
        new = self.bank.index_select(0, self.slot)[0] if live is None else live()
        return torch.where(_kept(self.selected), new, out)


class Ablate(Operation):
    """Gives selected rows a zero output."""

    def __init__(self) -> None:
        super().__init__()
        self.selected: Tensor  # [R, 1, 1] bool

    def __call__(self, out: Tensor) -> Tensor:
        """Return the output with the selected rows at zero."""
        self.mark()
        return out.masked_fill(_kept(self.selected), 0)


class Change(Operation):
    """Changes the output, in the order of attachment with what is added."""

    def __call__(self, out: Tensor) -> Tensor:
        """Return the output of the site, changed."""
        raise NotImplementedError


class OutputSide(Operation):
    """One side of a `tap_` call on the output of a site.

    Attributes:
        rows: block of rows that the buffers describe; None = all.
        tokens: slice of tokens that the buffers describe; None = all.
        active: block of rows that can be touched; None = all.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rows: slice | None = None
        self.tokens: slice | None = None
        self.active: slice | None = None


class Record(OutputSide):
    """Captures the output."""

    buffers = Capture()


class Inside(Record):
    """Captures what happens within the attention rather than its output; changes nothing."""

    def view(self, attn: Any) -> Any:
        """Return the attention module as the processor is to see it."""
        return attn

    def watch(self) -> contextlib.AbstractContextManager[Any] | None:
        """Return what surrounds a call of the processor; None = nothing."""
        return None


class Attend(Operation):
    """Computes the attention itself, in place of the model's processor."""

    def __call__(self, hidden: Tensor, context: Tensor, inside: list[Inside]) -> Tensor:
        """Return the output of the attention module, and let `inside` see what is within."""
        raise NotImplementedError


class Add(OutputSide):
    """Adds directions to the output; does nothing until `buffers` are there.

    Attributes:
        live: makes the same of the tensors that a gradient is wanted for; None = there are none.
    """

    buffers: Steering | None = None
    live: Callable[[], Steering] | None = None


class TapCall:
    """A capture and a steer, or one of them, as one `tap_` call."""

    def __init__(self, record: Record | None, add: Add | None) -> None:
        first = record or add
        if first is None:
            raise ValueError("TapCall: expected a capture or a steer, got neither")
        self.parts = [p for p in (record, add) if p is not None]
        self.where: tuple[slice, slice] | None = None
        if first.rows is not None or first.tokens is not None:
            self.where = (first.rows or slice(None), first.tokens or slice(None))
        self.capture = None if record is None else record.buffers
        self.steering = None if add is None else _cut(add.buffers, first.rows)
        self.rows, self.add = first.rows, add

    def __call__(self, out: Tensor) -> Tensor:
        """Capture from `out` and steer it, in place where no gradient is wanted."""
        first = True
        for part in self.parts:
            first = part.mark()
        view = out if self.where is None else out[self.where]
        live = None if self.add is None else self.add.live
        if torch.is_grad_enabled() and (out.requires_grad or live is not None):
            return self._differentiable(out, view, first)
        tap_(view, self.capture, self.steering)
        return out

    def _differentiable(self, out: Tensor, view: Tensor, first: bool) -> Tensor:
        if self.capture is not None and first:
            tap_(view.detach(), self.capture)
        if self.steering is None:
            return out
        live = None if self.add is None else self.add.live
        steering = self.steering if live is None else _cut(live(), self.rows)
        steered, _ = reference_tap(view, steering=steering)
        if self.where is None:
            return steered
        out = out.clone()
        out[self.where] = steered
        return out


def _cut(steering: Steering | None, rows: slice | None) -> Steering | None:
    """Narrow what steering holds for each row to a block of rows, as views."""
    if steering is None or rows is None:
        return steering

    def part(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[rows]

    mask = steering.mask
    return steering._replace(
        index=part(steering.index),
        strength=part(steering.strength),
        removal=part(steering.removal),
        mask=mask if mask is None or mask.shape[0] == 1 else mask[rows],
    )


def fits(record: Record, add: Add) -> bool:
    """Tell whether both share one call: same tokens, and no steered row outside the captured."""
    if record.tokens != add.tokens:
        return False
    if record.rows is None:
        return True
    rows = add.active
    return rows is not None and record.rows.start <= rows.start and rows.stop <= record.rows.stop


class SplitAttention:
    """An attention module whose keys and values may come from different contexts."""

    def __init__(self, attn: Any, swaps: list[Swap]) -> None:
        self._attn = attn
        self._keys = [s for s in swaps if s.key]
        self._values = [s for s in swaps if s.value]

    def to_k(self, context: Tensor) -> Tensor:
        """Project the keys' context."""
        for swap in self._keys:
            context = swap(context)
        return self._attn.to_k(context)

    def to_v(self, context: Tensor) -> Tensor:
        """Project the values' context."""
        for swap in self._values:
            context = swap(context)
        return self._attn.to_v(context)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_attn"], name)
