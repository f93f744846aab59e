# SPDX-License-Identifier: Apache-2.0
"""A tap that hands on what sites put out step by step, instead of keeping a whole run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..pipelines import Run, Site, SitePattern, sites
from . import options
from .base import Tap
from .options import Steps
from .processor import Operation, Pass


@dataclass(frozen=True)
class Selection:
    """Which of the rows that sites put out in a generation are kept.

    Attributes:
        passes: "cond", "uncond" or "all".
        steps: (start, stop) in scheduler steps, or in fractions of the generation. None = all.
        every: keep one step in so many of these, the first included.
        tokens: slice of tokens. None = all.
    """

    passes: str = "cond"
    steps: Steps = None
    every: int = 1
    tokens: slice | None = None


@dataclass(frozen=True)
class StepRows:
    """What the sites put out at one step.

    Attributes:
        step: number of the step.
        rows: [R' x T', C] on the CPU by alias of the site; R' = passes x samples.
        branches: CFG passes in the order of the rows.
        samples: B.
        tokens: numbers of the tokens kept, T' of them.
        run: the generation.
        ready: waits until the rows are on the CPU; None where they are.
    """

    step: int
    rows: dict[str, Tensor]
    branches: tuple[str, ...]
    samples: int
    tokens: Sequence[int]
    run: Run
    ready: Callable[[], None] | None


class StreamTap(Tap):
    """Copies the outputs of sites into one slot for each step and gives them to a consumer.

    Memory on the device is two steps, however long the run is. On CUDA the way to the CPU is a
    stream of its own into pinned memory; nothing in the run waits for it.

    Args:
        pipe: diffusers pipeline.
        sites_: see `SiteList.select`.
        selection: which rows are kept.
        dtype: of the rows.
        consumer: called with `StepRows` after each step that is kept.
    """

    name = "record"

    def __init__(
        self,
        pipe: Any,
        sites_: SitePattern,
        selection: Selection,
        dtype: torch.dtype,
        consumer: Callable[[StepRows], None],
    ) -> None:
        super().__init__(pipe, sites(pipe, sites_), selection.steps)
        self.every, self.dtype, self.consumer = selection.every, dtype, consumer
        self._wanted = options.parse_branches(self.name, selection.passes)
        self._tokens = options.parse_tokens(self.name, selection.tokens)
        if isinstance(self._tokens, Tensor):
            raise NotImplementedError("record: expected tokens as a slice, got a mask")
        self._slot: Tensor | None = None
        self._rings: dict[str, Tensor] = {}
        self._stream: Any = None
        self._copied: list[Any] = [None, None]  # CUDA events: the slot may be written again
        self._held: int | None = None  # the step that waits in slot `_place`
        self._place = 0

    def end(self) -> None:
        """Hand on the last step of a run that is over."""
        with torch.inference_mode(False), torch.no_grad():
            self._emit()

    def _operations_at(self, site: Site) -> list[Operation]:
        return [Pass(steers=False)]

    def _finish(self) -> None:
        self._emit()

    def _bind(self, run: Run) -> None:
        branches = self._branches(run, self._wanted)
        device = run.shape.device
        kept = options.count_tokens(self.name, self._slice(), run.shape.tokens)
        if self._slot is None or self._slot.device != device:
            self._slot = torch.full((1,), -1, dtype=torch.int64, device=device)
            self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        for site in self.sites:
            shape = (2, len(branches) * run.samples, kept, site.width)
            ring = self._rings.get(site.alias)
            if ring is None or ring.shape != shape or ring.device != device:
                ring = torch.zeros(shape, dtype=self.dtype, device=device)
                self._rings[site.alias] = ring
            (operation,) = self._operations[site.name]
            if isinstance(operation, Pass):
                operation.rows = operation.active = self._block(run, branches)
                operation.tokens = self._slice()
                operation.buffers = {"ring": ring, "capture_slot": self._slot}

    def _slice(self) -> slice | None:
        return self._tokens if isinstance(self._tokens, slice) else None

    def _advance(self, step: int, inside: bool) -> None:
        self._emit()
        if self._slot is None:
            return
        if not inside or (step - self._span[0]) % self.every:
            self._slot.fill_(-1)
            return
        self._place = 1 - self._place
        if self._copied[self._place] is not None:
            torch.cuda.current_stream(self._slot.device).wait_event(self._copied[self._place])
        self._slot.fill_(self._place)
        self._held = step

    def _emit(self) -> None:
        run, step, self._held = self._run, self._held, None
        if step is None or run is None:
            return
        rows, ready = self._to_cpu()
        total = run.shape.tokens
        tokens = range(*(self._slice() or slice(None)).indices(total))
        branches = self._branches(run, self._wanted)
        self.consumer(StepRows(step, rows, branches, run.samples, tokens, run, ready))

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
