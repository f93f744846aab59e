# SPDX-License-Identifier: Apache-2.0
"""A tap that hands on what sites put out step by step, instead of keeping a whole generation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops import Capture
from ..pipelines import Generation, Site
from . import options
from .base import Tap
from .layout import expect
from .operations import Operation, Record
from .options import Where


@dataclass(frozen=True)
class StepRows:
    """What the sites put out at one step.

    Attributes:
        step: number of the step.
        rows: [R' x T', C] on the CPU by alias of the site; R' = branches x samples.
        branches: guidance branches in the order of the rows.
        samples: B.
        tokens: numbers of the tokens kept, T' of them.
        generation: that the step belongs to.
        ready: waits until the rows are on the CPU; None where they are.
    """

    step: int
    rows: dict[str, Tensor]
    branches: tuple[str, ...]
    samples: int
    tokens: Sequence[int]
    generation: Generation
    ready: Callable[[], None] | None


class StreamTap(Tap):
    """Copies the outputs of sites into one slot for each step and gives them to a consumer.

    Memory on the device is two steps, however long the generation is. On CUDA rows are copied to
    pinned memory on a stream of their own; nothing in the generation waits for it.

    Args:
        pipe: diffusers pipeline.
        where: sites, branches, steps and tokens (a slice) to copy.
        every: distance of the steps that are kept; the first of the window is.
        dtype: of the rows.
        consumer: called with `StepRows` after each step that is kept.
    """

    name = "record"

    def __init__(
        self,
        pipe: Any,
        where: Where,
        every: int,
        dtype: torch.dtype,
        consumer: Callable[[StepRows], None],
    ) -> None:
        super().__init__(pipe, where.chosen(pipe, "*"), where.steps)
        self.every, self.dtype, self.consumer = every, dtype, consumer
        self._wanted = options.parse_branches(self.name, where.branches)
        self._tokens = options.parse_tokens(self.name, where.tokens)
        if isinstance(self._tokens, Tensor):
            raise NotImplementedError("record: expected tokens as a slice, got a mask")
        self._slot: Tensor | None = None
        self._rings: dict[str, Tensor] = {}
        self._stream: Any = None
        self._copied: list[Any] = [None, None]  # CUDA events: the slot may be written again
        # Step and branches that wait in slot `_place`.
        self._held: tuple[int, tuple[str, ...]] | None = None
        self._place = 0

    def end(self) -> None:
        """Hand on the last step of a generation that is over."""
        with torch.inference_mode(False), torch.no_grad():
            self._emit()

    def _operations_at(self, site: Site) -> list[Operation]:
        return [Record()]

    def _finish(self) -> None:
        self._emit()

    def _bind(self, generation: Generation) -> tuple[str, ...]:
        self._emit()  # the rings may be made anew
        branches = self._branches(generation, self._wanted)
        device = generation.shape.device
        options.common_tokens(self.name, "one set of labels is for all", self.sites, generation)
        kept = options.count_tokens(self.name, self._slice(), self.sites[0], generation)
        if self._slot is None or self._slot.device != device:
            self._slot = torch.full((1,), -1, dtype=torch.int64, device=device)
            self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        # With several calls in a step one of them is copied at a time; none where all are absent.
        blocks = 1 if len(generation.calls) > 1 else max(len(branches), 1)
        for site in self.sites:
            shape = (2, blocks * generation.samples, kept, site.width)
            ring = self._rings.get(site.alias)
            if ring is None or ring.shape != shape or ring.device != device:
                ring = torch.zeros(shape, dtype=self.dtype, device=device)
                self._rings[site.alias] = ring
            (operation,) = self._operations[site.name]
            if isinstance(operation, Record):
                expect([operation], site, generation)
                operation.rows = operation.active = self._block(generation, branches)
                operation.tokens = self._slice()
                operation.buffers = Capture(ring=ring, slot=self._slot) if branches else Capture()
        return branches

    def _slice(self) -> slice | None:
        return self._tokens if isinstance(self._tokens, slice) else None

    def _advance(self, step: int, call: int, inside: bool) -> None:
        self._emit()
        if self._slot is None:
            return
        branches = self._wanted_of(call)
        if not inside or not branches or (step - self._span[0]) % self.every:
            self._slot.fill_(-1)
            return
        self._place = 1 - self._place
        if self._copied[self._place] is not None:
            torch.cuda.current_stream(self._slot.device).wait_event(self._copied[self._place])
        self._slot.fill_(self._place)
        self._held = (step, branches)

    def _wanted_of(self, call: int) -> tuple[str, ...]:
        generation = self._generation
        branches = () if generation is None else generation.calls[call]
        return tuple(b for b in branches if self._wanted is None or b in self._wanted)

    def _emit(self) -> None:
        generation, held, self._held = self._generation, self._held, None
        if held is None or generation is None:
            return
        rows, ready = self._to_cpu()
        total = generation.tokens(self.sites[0])
        tokens = range(*(self._slice() or slice(None)).indices(total))
        step, branches = held
        self.consumer(StepRows(step, rows, branches, generation.samples, tokens, generation, ready))

    def _to_cpu(self) -> tuple[dict[str, Tensor], Callable[[], None] | None]:
        found = {alias: ring[self._place].flatten(0, 1) for alias, ring in self._rings.items()}
        if self._stream is None:
            return {alias: rows.to("cpu", copy=True) for alias, rows in found.items()}, None
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        host: dict[str, Tensor] = {}
        with torch.cuda.stream(self._stream):
            for alias, rows in found.items():
                pinned = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
                host[alias] = pinned.copy_(rows, non_blocking=True)
            event = torch.cuda.Event()
            event.record(self._stream)
        self._copied[self._place] = event
        return host, event.synchronize
