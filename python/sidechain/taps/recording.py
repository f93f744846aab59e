# SPDX-License-Identifier: Apache-2.0
"""Buffers of a capture, and the table that they make when a generation is over."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..ops import Capture as Buffers
from ..pipelines import Generation

_FIELDS = ("sums", "squares", "counts", "ring", "mask")


@dataclass(frozen=True)
class Labels:
    """What the axes of a capture mean.

    Attributes:
        steps: step number of each entry of the first axis.
        timesteps: of these steps, [steps] float64.
        sigmas: of these steps, [steps] float64, or None.
        branches: guidance branch of each entry of the second axis.
        samples: B, all generations together.
        present: which branch was there at which step, [steps, branches] bool: guidance may be off
            in some of the steps.
    """

    steps: tuple[int, ...]
    timesteps: Tensor
    sigmas: Tensor | None
    branches: tuple[str, ...]
    samples: int
    present: Tensor


Recorded = tuple[Labels, dict[str, Buffers]]  # one generation, by name of the site


@dataclass
class Layout:
    """Buffers for the denoiser calls of one shape.

    Attributes:
        generation: that they were last bound for.
        branches: kept in each call of a step that has any of them, by number of the call; the
            buffers have one slot for each of these calls and each step.
        buffers: by name of the site.
        recorded: step and call that the context of a branch is of.
    """

    generation: Generation
    branches: dict[int, tuple[str, ...]]
    buffers: dict[str, Buffers]
    recorded: dict[str, tuple[int, int]] = field(default_factory=dict)

    def slot(self, place: int, call: int) -> int:
        """Return the slot of a call of the step at a place; -1 where nothing of it is kept."""
        calls = list(self.branches)
        return place * len(calls) + calls.index(call) if call in self.branches else -1

    def rows(self, call: int, branch: str) -> slice:
        """Return the rows of a branch within the buffers of its call."""
        size = self.generation.samples
        first = self.branches[call].index(branch) * size
        return slice(first, first + size)


@dataclass(frozen=True)
class KeptCall:
    """A denoiser call of which something may have been kept."""

    step: int
    call: int
    layout: Layout

    @property
    def branches(self) -> tuple[str, ...]:
        """Branches that are kept of it."""
        return self.layout.branches.get(self.call, ())


def tensors(buffers: Buffers) -> list[Tensor]:
    """Return the buffers that are there, masks of contexts among them."""
    return [t for t in (*buffers[:4], buffers.mask) if t is not None]


def each(function: Callable[[Tensor], Tensor], buffers: Buffers) -> Buffers:
    """Apply a function to every buffer that is there; slot and mask are left out."""
    return Buffers(*(None if t is None else function(t) for t in buffers[:4]))


def mean_of(total: Tensor | None, counts: Tensor | None) -> Tensor:
    """Divide sums over tokens by the number of tokens."""
    if total is None or counts is None:
        raise RuntimeError("capture: expected sums and counts of this reduction, got none")
    return total / counts[..., None]


def gather(
    calls: Sequence[KeptCall], generation: Generation, span: tuple[int, int], context: bool
) -> Recorded:
    """Return what the calls of a generation have left, with its labels.

    Args:
        calls: those within the window, at least one of them with a branch.
        generation: that they are of.
        span: steps of the window.
        context: whether contexts were recorded, once for each branch.

    Returns:
        Labels, and by site buffers [steps, branches * B, ...], without steps for contexts.
    """
    # Those that ran: a schedule may begin late, and a generation may stop early.
    steps = tuple(dict.fromkeys(call.step for call in calls))
    layouts = list({id(call.layout): call.layout for call in calls}.values())
    ran = {branch for call in calls for branch in call.branches}
    # The longest list has them all, in order: shorter ones lack those that were absent.
    order = max((layout.generation.branches for layout in layouts), key=len)
    branches = tuple(branch for branch in order if branch in ran)
    present = torch.zeros(len(steps), len(branches), dtype=torch.bool)
    for call in calls:
        for branch in call.branches:
            present[steps.index(call.step), branches.index(branch)] = True
    labels = Labels(
        steps,
        generation.timesteps[list(steps)],
        None if generation.sigmas is None else generation.sigmas[list(steps)],
        branches,
        generation.samples,
        present,
    )
    if len(layouts) == 1 and len(layouts[0].branches) == 1 and not context:
        place = _places(steps, span[0])
        found = layouts[0].buffers
        return labels, {name: each(lambda t: t[place], kept) for name, kept in found.items()}
    sites = layouts[0].buffers
    start = None if context else span[0]
    return labels, {name: _assembled(name, labels, calls, start) for name in sites}


def _places(steps: tuple[int, ...], start: int) -> Any:
    """Return the slots of steps as an index, a slice where they follow each other."""
    first, count = steps[0] - start, len(steps)
    if steps == tuple(range(steps[0], steps[0] + count)):
        return slice(first, first + count)
    return [step - start for step in steps]


def _assembled(name: str, labels: Labels, calls: Sequence[KeptCall], start: int | None) -> Buffers:
    """Gather what calls of several kinds have left of a site; `start` None: its context."""
    size, found = labels.samples, dict[str, Tensor]()
    for kept in calls:
        branches, layout = kept.branches, kept.layout
        place, slot = 0, layout.slot(0, kept.call)
        if start is None:
            now = (kept.step, kept.call)
            branches = tuple(b for b in branches if layout.recorded.get(b) == now)
        else:
            place = labels.steps.index(kept.step)
            slot = layout.slot(kept.step - start, kept.call)
        if not branches:
            continue
        for field_ in _FIELDS:
            source = getattr(layout.buffers[name], field_)
            if source is None:
                continue
            if field_ not in found:
                shape = (1 if start is None else len(labels.steps), len(labels.branches) * size)
                empty = 0 if field_ in ("counts", "mask") else torch.nan
                found[field_] = source.new_full((*shape, *source.shape[2:]), empty)
            target = found[field_]
            if target.shape[2:] != source.shape[2:]:
                raise NotImplementedError(
                    f"capture: expected calls of one size within a generation, got "
                    f"{list(target.shape[2:])} and {list(source.shape[2:])} at {name}"
                )
            for branch in branches:
                row = labels.branches.index(branch) * size
                rows = layout.rows(kept.call, branch)
                target[place, row : row + size] = source[slot, rows]
    return Buffers(**found)
