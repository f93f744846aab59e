# SPDX-License-Identifier: Apache-2.0
"""What is known of one generation: its rows, guidance branches, steps and shapes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from .adapter import Adapter, CallShape
from .sites import Site


@dataclass(frozen=True, eq=False)
class Generation:
    """One generation, as it is known at a denoiser call.

    A new one with the same `number` follows where the shape of the calls changes on the way, as
    with guidance in some of the steps only.

    Attributes:
        number: counts the generations of the GenerationTracker.
        samples: B.
        steps: number of scheduler steps announced.
        calls: guidance branches of each denoiser call of a step, in the order of the calls; the
            branches of one call are its blocks of B rows.
        shape: of the denoiser calls.
        timesteps: [steps] float64 on the CPU.
        sigmas: [steps] float64 on the CPU; None where the scheduler has none.
        adapter: of the family.
        elsewhere: branches that other steps of this generation may have, or have had.
    """

    number: int
    samples: int
    steps: int
    calls: tuple[tuple[str, ...], ...]
    shape: CallShape
    timesteps: Tensor
    sigmas: Tensor | None
    adapter: Adapter
    elsewhere: frozenset[str] = frozenset()

    @cached_property
    def branches(self) -> tuple[str, ...]:
        """Guidance branches of the calls of a step, in their order."""
        return tuple(branch for call in self.calls for branch in call)

    @cached_property
    def sample_of_row(self) -> Tensor:
        """[R] int64 on the device."""
        return torch.arange(self.shape.rows, device=self.shape.device) % self.samples

    def branch_of_row(self, call: int) -> Tensor:
        """Return the index into `branches` of each row of a call, [R] int64 on the device."""
        first = self.branches.index(self.calls[call][0])
        return torch.arange(self.shape.rows, device=self.shape.device) // self.samples + first

    def rows_of(self, branch: str) -> slice:
        """Return the block of rows of a guidance branch in its call."""
        place = self.calls[self.call_of(branch)].index(branch)
        return slice(place * self.samples, (place + 1) * self.samples)

    def call_of(self, branch: str) -> int:
        """Return the number of the call that a branch is in."""
        return next(n for n, branches in enumerate(self.calls) if branch in branches)

    def tokens(self, site: Site) -> int:
        """Return T of the output of a site."""
        return self.adapter.tokens(site, self.shape)

    def context_tokens(self, site: Site) -> int:
        """Return S of the context of a site, 0 where it reads none."""
        return self.adapter.context_tokens(site, self.shape)


class Observer(Protocol):
    """What a tap offers to its GenerationTracker."""

    def bind(self, generation: Generation) -> None:
        """Size and fill device buffers; called before the first denoiser call of a shape."""

    def advance(self, step: int, call: int) -> None:
        """Point the device buffers at a denoiser call of a step, before it."""

    def before_call(self) -> None:
        """Note that a denoiser call begins."""

    def after_call(self, step: int) -> None:
        """Check that every site ran once in the denoiser call that ends."""
