# SPDX-License-Identifier: Apache-2.0
"""What all taps have in common: attach, follow the generation, detach, notice silence."""

from __future__ import annotations

import warnings
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from ..pipelines import (
    Generation,
    GenerationTracker,
    Site,
    SiteList,
    observe,
    observers,
    release,
)
from .attach import arrange, attach, detach
from .operations import Operation
from .options import Steps, Window, same_device


class Tap:
    """A set of operations at the sites of one pipeline.

    A context manager and a handle: `with tap: pipe(...)`, or `tap.attach()` and `tap.remove()`.
    """

    name = "tap"

    def __init__(self, pipe: Any, sites: SiteList, steps: Steps) -> None:
        self.pipe = pipe
        self.sites = sites
        self.window = Window.parse(self.name, steps)
        self._operations: dict[str, list[Operation]] = {}
        self._tracker: GenerationTracker | None = None
        self._generation: Generation | None = None
        self._span = (0, 0)
        self._calls = 0
        self._inside = False  # whether a call within the window came
        self._ever_active = False  # and one of a branch that the tap acts on
        self._acts_on: tuple[str, ...] = ()
        self._seen_branches: set[str] = set()
        self._by_handle = False

    # -- life ---------------------------------------------------------------------------------

    @property
    def attached(self) -> bool:
        """Tell whether the tap is in place."""
        return self._tracker is not None

    @property
    def tracker(self) -> GenerationTracker:
        """The GenerationTracker this tap follows.

        Raises:
            RuntimeError: the tap is not attached.
        """
        if self._tracker is None:
            raise RuntimeError(f"{self.name}: expected an attached tap, got one that is not")
        return self._tracker

    def attach(self) -> Self:
        """Put the tap in place until `remove`; warns if another such tap was attached like this.

        Raises:
            RuntimeError: it is there already.
        """
        lost = [
            tap for tap in attached(self.pipe)
            if tap._by_handle and type(tap) is type(self) and not tap._sites_apart(self)
        ]  # fmt: skip
        if lost and self._tracker is None:
            warnings.warn(
                f"{self.name}: expected no other {self.name} attached at these sites, got "
                f"{lost[0]!r}, which stays [if its handle is lost: sidechain.detach_all(pipe)]",
                RuntimeWarning,
                stacklevel=2,
            )
        self._put_in()
        self._by_handle = True
        return self

    def _sites_apart(self, other: Tap) -> bool:
        return not {s.name for s in self.sites} & {s.name for s in other.sites}

    def _put_in(self) -> None:
        if self._tracker is not None:
            raise RuntimeError(f"{self.name}: expected a tap that is not attached, got an attached")
        self._operations = {site.name: self._operations_at(site) for site in self.sites}
        self._generation, self._calls = None, 0
        self._ever_active = self._inside = False
        self._seen_branches = set()
        self._tracker = observe(self.pipe, self)
        for operations in self._operations.values():
            for operation in operations:
                operation.tracker = self._tracker
        done: list[tuple[Site, Operation]] = []
        try:
            for site in self.sites:
                for operation in self._operations[site.name]:
                    attach(site, operation)
                    done.append((site, operation))
        except BaseException:
            for site, operation in reversed(done):
                detach(site, operation)
            self._leave()
            raise

    def remove(self) -> None:
        """Take the tap out and put every processor back; warns if the tap never fired."""
        if self._tracker is None:
            return
        self._take_out()
        silent = self._silence()
        if silent:
            warnings.warn(silent, RuntimeWarning, stacklevel=2)

    def _take_out(self) -> None:
        try:
            for site in self.sites:
                for operation in self._operations[site.name]:
                    detach(site, operation)
        finally:
            self._leave()

    def _leave(self) -> None:
        release(self.pipe, self)
        self._tracker, self._by_handle = None, False

    def __repr__(self) -> str:
        state = "attached" if self.attached else "not attached"
        return f"<{self.name} at {', '.join(self.sites.aliases)}, {state}>"

    def __enter__(self) -> Self:
        self._put_in()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._tracker is None:
            return
        self._take_out()
        silent = self._silence()
        if silent and kind is None:
            raise RuntimeError(silent)

    def _silence(self) -> str | None:
        """Say that nothing ran where the tap acts while it was attached."""
        if self._calls and self._ever_active:
            return None
        if self._inside:
            return (
                f"{self.name}: expected at least one call of the branch to act on, got those of "
                f"{', '.join(sorted(self._seen_branches))} [guidance off?]"
            )
        return (
            f"{self.name}: expected every tapped site to run at least once, got no call at "
            f"{', '.join(self.sites.names)}"
        )

    # -- following the generation -------------------------------------------------------------

    def bind(self, generation: Generation) -> None:
        """Size and fill the device buffers for a generation."""
        # Buffers made in inference mode could not be filled outside of it later.
        with torch.inference_mode(False), torch.no_grad():
            if self._generation is not None and generation.number != self._generation.number:
                self._finish()
            self._span = self.window.resolve(self.name, generation.steps)
            self._acts_on = self._bind(generation)
            self._generation = generation
        for site in self.sites:
            arrange(site)

    def advance(self, step: int, call: int) -> None:
        """Point the device buffers at a denoiser call of a step; without gradients."""
        if self._generation is None:
            raise RuntimeError(f"{self.name}: expected bind before advance, got none")
        inside = self._span[0] <= step < self._span[1]
        self._inside |= inside
        branches = self._generation.calls[call]
        self._ever_active |= inside and any(branch in self._acts_on for branch in branches)
        self._seen_branches.update(branches)
        self._advance(step, call, inside)

    def before_call(self) -> None:
        """Note that a denoiser call begins."""
        for operations in self._operations.values():
            for operation in operations:
                operation.fired = 0

    def after_call(self, step: int) -> None:
        """Check that every site ran once in a denoiser call.

        Raises:
            RuntimeError: a site was left out (attention caches, skipped layers, a processor that
                was replaced), or ran several times.
        """
        self._calls += 1
        for site in self.sites:
            for operation in self._operations[site.name]:
                if operation.fired != 1:
                    raise RuntimeError(
                        f"{self.name}: expected one call of {site.alias} ({site.name}) in the "
                        f"denoiser call of step {step}, got {operation.fired} [an attention cache, "
                        "a skipped layer, or a processor that was replaced?]"
                    )

    def _operations_at(self, site: Site) -> list[Operation]:
        raise NotImplementedError

    def _finish(self) -> None:
        """Put away what the finished generation left in the buffers."""

    def _bind(self, generation: Generation) -> tuple[str, ...]:
        """Size and fill the buffers; return the branches that the tap acts on."""
        raise NotImplementedError

    def _advance(self, step: int, call: int, inside: bool) -> None:
        raise NotImplementedError

    # -- helpers ------------------------------------------------------------------------------

    def _branches(self, generation: Generation, wanted: tuple[str, ...] | None) -> tuple[str, ...]:
        """Return the wanted guidance branches of a generation in batch order.

        None of them where only other steps of the generation have them.
        """
        if wanted is None:
            return generation.branches
        missing = set(wanted) - {*generation.branches, *generation.elsewhere}
        if missing:
            raise ValueError(
                f"{self.name}: expected a generation with the {' and '.join(sorted(missing))} "
                f"branch, got {list(generation.branches)} [guidance off?]"
            )
        return tuple(b for b in generation.branches if b in wanted)

    @staticmethod
    def _block(generation: Generation, branches: tuple[str, ...]) -> slice | None:
        """Return the rows of neighbouring branches as one block of their call; None = all rows.

        With several calls in a step all rows of a call are of one branch.
        """
        if not branches or branches == generation.branches or len(generation.calls) > 1:
            return None
        return slice(generation.rows_of(branches[0]).start, generation.rows_of(branches[-1]).stop)

    def _check_device(self, option: str, value: Tensor, device: torch.device) -> None:
        if not same_device(value.device, device):
            raise ValueError(
                f"{self.name}: expected {option} on {device} [where the denoiser computes], got "
                f"{value.device}"
            )


def attached(pipe: Any) -> list[Tap]:
    """Return the taps that are attached to a pipeline, in the order of their attachment."""
    return [observer for observer in observers(pipe) if isinstance(observer, Tap)]


def detach_all(pipe: Any) -> list[Tap]:
    """Take every tap of a pipeline out, also those whose handles are lost; return them."""
    taps = attached(pipe)
    for tap in reversed(taps):
        tap._take_out()
    return taps
