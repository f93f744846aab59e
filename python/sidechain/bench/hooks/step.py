# SPDX-License-Identifier: Apache-2.0
"""What taps, plain hooks and nnsight add to whole denoiser steps in eager mode.

A step is what a pipeline does in its loop: denoiser, guidance, scheduler. At every site a mean over
tokens is kept and a direction of the step is added, both for the conditional rows. `tracker` is a
pipeline that is followed and has no tap: what it costs to know step, branch and sample.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import sidechain
from sidechain.pipelines import Generation, observe, release

from ..cases import Row
from ..machine import Machine
from ..timing import Call, in_turns
from .models import Forward, Model, music, stable_audio
from .ways import Way, hooked, load_nnsight, nnsight_absent, rows_of

STEPS = 20  # of a generation
LONGER = 5.0  # times the seconds of a site
ROUNDS = 12
# name -> builds the model
CASES: dict[str, Callable[[str], Model]] = {
    "step-zoo-R2": partial(music, 1),
    "step-zoo-R16": partial(music, 8),
    "step-stable-audio-1-block-R2": partial(stable_audio, 1536, 24, 1025, 130, 1),
}
QUICK: dict[str, Callable[[str], Model]] = {"step-tiny-R2": partial(music, 1, tiny=True)}
NOTHING = "nothing"
KINDS = {
    "nothing again": "bare",
    "tracker": "ours",
    "hooks: mean + add": "plain",
    "nnsight: mean + add": "peer",
    "taps: mean + steer": "ours",
}


def names(quick: bool) -> list[str]:
    """The cases; quick: a tiny model."""
    return list(QUICK if quick else CASES)


def measured(name: str, machine: Machine, seconds: float) -> list[Row]:
    """Check what is compared, then time it in turns."""
    steps = Steps({**CASES, **QUICK}[name](machine.device))
    steps.check()
    ways = {NOTHING: steps.bare, "nothing again": steps.bare, **steps.ways()}
    taken = in_turns(ways, machine.device, LONGER * seconds, rounds=ROUNDS)
    return rows_of(name, taken, {NOTHING: "bare", **KINDS}, NOTHING, nnsight_absent())


class Follower:
    """An observer that does nothing."""

    def bind(self, generation: Generation) -> None:
        """Nothing."""

    def advance(self, *_: int) -> None:
        """Nothing."""

    def before_call(self) -> None:
        """Nothing."""

    def after_call(self, *_: int) -> None:
        """Nothing."""


class Steps:
    """Steps of generations of one model, one after the other, with what can be put around them.

    Args:
        model: what is called.
    """

    def __init__(self, model: Model) -> None:
        self.model, self.pipe = model, model.pipe
        self.sites = list(sidechain.sites(self.pipe))
        self.modules: list[Any] = [site.module for site in self.sites]
        device = model.latents.device
        self.tables = [torch.randn(STEPS, site.width, device=device) for site in self.sites]
        self.cond = slice(model.samples, None)
        self.place = STEPS
        self.means: list[list[Tensor]] = []

    def step(self, forward: Forward | None = None) -> Tensor:
        """One step; the first of a new generation where the last one is over."""
        scheduler = self.pipe.scheduler
        if self.place == STEPS:
            scheduler.set_timesteps(STEPS, device=self.model.latents.device)
            self.place, self.means = 0, [[] for _ in self.sites]
        out = self.model.step(scheduler.timesteps[self.place], forward)
        self.place += 1
        return out

    @contextlib.contextmanager
    def bare(self) -> Iterator[Call]:
        """Nothing attached."""
        self.place = STEPS
        yield self.step

    @contextlib.contextmanager
    def by_hooks(self) -> Iterator[Call]:
        """Plain hooks."""

        def both(number: int, out: Tensor) -> Tensor:
            self.means[number].append(out[self.cond].float().mean(1))
            out[self.cond] += 2.0 * self.tables[number][self.place]
            return out

        self.place = STEPS
        with hooked(self.modules, both):
            yield self.step

    @contextlib.contextmanager
    def by_taps(self) -> Iterator[Call]:
        """One steer and one capture at all sites."""
        vectors = {site.name: table for site, table in zip(self.sites, self.tables, strict=True)}
        with (
            sidechain.steer(self.pipe, vectors, strength=2.0) as self.steered,
            sidechain.capture(self.pipe, list(vectors)) as self.captured,
        ):
            self.captured.tracker.begin(self.model.samples, STEPS)  # as prepare_latents tells it
            self.place = STEPS
            yield self.step

    @contextlib.contextmanager
    def by_tracker(self) -> Iterator[Call]:
        """A pipeline that is followed."""
        follower = Follower()
        tracker = observe(self.pipe, follower)
        try:
            tracker.begin(self.model.samples, STEPS)
            self.place = STEPS
            yield self.step
        finally:
            release(self.pipe, follower)

    @contextlib.contextmanager
    def by_nnsight(self) -> Iterator[Call]:
        """A trace of each denoiser call that does what the hooks do."""
        nnsight = load_nnsight()
        model, cond, tables = nnsight.NNsight(self.model.denoiser), self.cond, self.tables
        found = {path.removeprefix("model."): each for path, each in model.named_modules()}
        envoys = [found[site.name] for site in self.sites]

        def forward(*args: Any, **kwargs: Any) -> Any:
            place = self.place
            with model.trace(*args, **kwargs):
                means = nnsight.save([])
                for envoy, table in zip(envoys, tables, strict=True):
                    means.append(envoy.output[cond].float().mean(1))
                    envoy.output[cond] += 2.0 * table[place]
                out = nnsight.save(model.output)
            for kept, mean in zip(self.means, means, strict=True):
                kept.append(mean)
            return out

        self.place = STEPS
        yield partial(self.step, forward)

    def ways(self) -> dict[str, Way]:
        """Every way that can run here."""
        ways: dict[str, Way] = {
            "tracker": self.by_tracker,
            "hooks: mean + add": self.by_hooks,
            "taps: mean + steer": self.by_taps,
        }
        return ways if nnsight_absent() else ways | {"nnsight: mean + add": self.by_nnsight}

    def check(self) -> list[Tensor]:
        """Check that hooks, nnsight and taps give the same numbers in two steps.

        Returns:
            What the steps give.

        Raises:
            AssertionError: they do not.
        """
        with self.by_hooks() as call:
            expected: list[Any] = [call(), call()]
            means = [torch.stack(each) for each in self.means]  # [2, B, C] of each site
        with self.by_taps() as call:
            torch.testing.assert_close([call(), call()], expected, rtol=1e-3, atol=1e-4)
            for site, mean in zip(self.sites, means, strict=True):
                got = self.captured[site.name][:, 0]
                torch.testing.assert_close(got, mean, rtol=1e-3, atol=1e-4)
        if not nnsight_absent():
            with self.by_nnsight() as call:
                torch.testing.assert_close([call(), call()], expected)
                torch.testing.assert_close([torch.stack(m) for m in self.means], means)
        return expected
