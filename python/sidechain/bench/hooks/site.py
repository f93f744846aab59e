# SPDX-License-Identifier: Apache-2.0
"""What a tap, a hand-written hook or nnsight adds to one call of an attention module.

One cross-attention module of the real class is called in eager mode. While it is timed its
processor returns its input, so that only the added work remains. Attaching is not timed, because it
happens once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import sidechain

from ..cases import Row
from ..machine import Machine
from ..timing import Call, in_turns
from .models import Model, sdxl, stable_audio
from .ways import Way, hooked, load_nnsight, nnsight_absent, rows_of

# name -> builds the model: width, heads, tokens, context tokens, samples; width, side, samples
CASES: dict[str, Callable[[str], Model]] = {
    "zoo-R16-T65-C160": partial(stable_audio, 160, 5, 65, 24, 8),
    "zoo-R64-T65-C160": partial(stable_audio, 160, 5, 65, 24, 32),
    "stable-audio-R2-T1025-C1536": partial(stable_audio, 1536, 24, 1025, 130, 1),
    "stable-audio-R8-T1025-C1536": partial(stable_audio, 1536, 24, 1025, 130, 4),
    "sdxl-R2-T4096-C640": partial(sdxl, 640, 64, 1),
    "sdxl-R2-T1024-C1280": partial(sdxl, 1280, 32, 1),
}
BARE = "bare"
KINDS = {
    "hook: mean": "plain",
    "nnsight: mean": "peer",
    "tap: mean": "ours",
    "hook: add": "plain",
    "nnsight: add": "peer",
    "tap: steer": "ours",
    "hook: mean + add": "plain",
    "nnsight: mean + add": "peer",
    "tap: mean + steer": "ours",
    "tap: steer, renorm": "ours",
    "tap: context swap": "ours",
}


def names(quick: bool) -> list[str]:
    """The cases; quick: the first."""
    return list(CASES)[: 1 if quick else None]


def measured(name: str, machine: Machine, seconds: float) -> list[Row]:
    """Check what is compared, then time it in turns."""
    site = Site(name, machine)
    site.check()
    taken = in_turns({BARE: site.bare, **site.ways()}, machine.device, seconds)
    return rows_of(name, taken, {BARE: "bare", **KINDS}, BARE, nnsight_absent())


class Through:
    """A processor without cost, which returns its input."""

    def __call__(  # noqa: D102
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        return hidden_states


class Site:
    """One attention module with what can be put around its calls.

    Args:
        name: of the case.
        machine: where it is timed.
    """

    def __init__(self, name: str, machine: Machine) -> None:
        self.name, self.machine = name, machine
        self.model = CASES[name](machine.device)
        self.pipe, self.samples = self.model.pipe, self.model.samples
        found = sidechain.sites(self.pipe)["cross:0"]
        self.module: Any = found.module
        tokens = self.model.latents.shape[2:].numel() + (self.model.latents.dim() == 3)
        device = machine.device
        self.x = torch.randn(2 * self.samples, tokens, found.width, device=device)
        self.direction = torch.randn(found.width, device=device)
        self.cond = slice(self.samples, None)
        self.seen: list[Tensor] = []
        # The rest of the denoiser is of no interest, and a call that binds taps need not wait.
        self.model.denoiser.forward = lambda *args, **kwargs: (self.call(),)

    def call(self) -> Tensor:
        """One call of the module."""
        out: Tensor = self.module(self.x, encoder_hidden_states=self.model.context)
        return out

    def pool(self, _number: int, out: Tensor) -> None:
        """The hook that keeps a mean."""
        self.seen[:] = [out[self.cond].float().mean(1)]

    def add(self, _number: int, out: Tensor) -> Tensor:
        """The hook that adds a direction."""
        out[self.cond] += 2.0 * self.direction
        return out

    def pool_and_add(self, number: int, out: Tensor) -> Tensor:
        """Both hooks in one."""
        self.pool(number, out)
        return self.add(number, out)

    def capture(self) -> Any:
        """The tap that keeps a mean."""
        return sidechain.capture(self.pipe, "cross:0")

    def steer(self, **options: Any) -> Any:
        """The tap that adds the direction."""
        return sidechain.steer(self.pipe, {"cross:0": self.direction}, strength=2.0, **options)

    def swap(self) -> Any:
        """The tap that gives half the rows another context."""
        text = self.model.context[self.cond].clone()
        return sidechain.patch(self.pipe, "cross:0", context=text)

    @contextlib.contextmanager
    def bare(self) -> Iterator[Call]:
        """Nothing attached."""
        yield self.call

    @contextlib.contextmanager
    def by_hook(self, function: Callable[[int, Tensor], Tensor | None]) -> Iterator[Call]:
        """A plain hook."""
        with hooked([self.module], function):
            yield self.call

    @contextlib.contextmanager
    def by_taps(self, make: Sequence[Callable[[], Any]]) -> Iterator[Call]:
        """Taps, bound as the first denoiser call of a generation binds them."""
        with contextlib.ExitStack() as stack:
            taps = [stack.enter_context(each()) for each in make]
            taps[-1].tracker.begin(self.samples, 1000)
            self.model.call(torch.ones((), device=self.machine.device))
            yield self.call

    @contextlib.contextmanager
    def by_nnsight(self, *, pool: bool, add: bool) -> Iterator[Call]:
        """A trace that does what the hooks do."""
        nnsight = load_nnsight()
        model, cond, direction = nnsight.NNsight(self.module), self.cond, self.direction
        text, seen = self.model.context, self.seen

        def pooling() -> None:
            with model.trace(self.x, encoder_hidden_states=text):
                mean = nnsight.save(model.output[cond].float().mean(1))
            seen[:] = [mean]

        def adding() -> Tensor:
            with model.trace(self.x, encoder_hidden_states=text):
                model.output[cond] += 2.0 * direction
                out = nnsight.save(model.output)
            return out

        def both() -> Tensor:
            with model.trace(self.x, encoder_hidden_states=text):
                mean = nnsight.save(model.output[cond].float().mean(1))
                model.output[cond] += 2.0 * direction
                out = nnsight.save(model.output)
            seen[:] = [mean]
            return out

        yield both if pool and add else adding if add else pooling

    def ways(self) -> dict[str, Way]:
        """Every way that can run here."""
        ways: dict[str, Way] = {
            "hook: mean": lambda: self.by_hook(self.pool),
            "tap: mean": lambda: self.by_taps([self.capture]),
            "hook: add": lambda: self.by_hook(self.add),
            "tap: steer": lambda: self.by_taps([self.steer]),
            "hook: mean + add": lambda: self.by_hook(self.pool_and_add),
            "tap: mean + steer": lambda: self.by_taps([self.steer, self.capture]),
            "tap: steer, renorm": lambda: self.by_taps([lambda: self.steer(renorm=True)]),
            "tap: context swap": lambda: self.by_taps([self.swap]),
        }
        if not nnsight_absent():
            ways |= {
                "nnsight: mean": lambda: self.by_nnsight(pool=True, add=False),
                "nnsight: add": lambda: self.by_nnsight(pool=False, add=True),
                "nnsight: mean + add": lambda: self.by_nnsight(pool=True, add=True),
            }
        return ways

    def check(self) -> None:
        """Check that hooks, nnsight and taps give the same numbers; leave the processor empty.

        Raises:
            AssertionError: they do not.
        """
        with self.by_hook(self.pool_and_add) as call:
            expected, mean = call(), self.seen[0]
        with self.steer(), self.capture() as tap:
            tap.tracker.begin(self.samples, 1000)
            self.model.call(torch.ones((), device=self.machine.device))
            torch.testing.assert_close(tap["cross:0"][0, 0], mean, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(self.call(), expected)
        if not nnsight_absent():
            with self.by_nnsight(pool=True, add=True) as call:
                torch.testing.assert_close(call(), expected)
                torch.testing.assert_close(self.seen[0], mean)
        self.module.set_processor(Through())
