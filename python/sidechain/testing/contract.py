# SPDX-License-Identifier: Apache-2.0
"""The contract of a pipeline family, for ours and for one of your own.

Taps have to see and change what plain forward hooks see and change::

    def test_mine():
        def run(**changes):
            return pipe(["a piano", "a violin"], output_type="latent", **changes).images

        runs = Runs(pipe, run, order=("uncond", "cond"), off={"guidance_scale": 1.0})
        for check in CHECKS:
            check(runs)

Each check returns nothing or raises `AssertionError`; where a family has nothing to check (no
cross-attention, no guidance), it returns.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..pipelines import Site, SiteList, sites
from ..pipelines.adapter import find_denoiser
from ..taps import Capture, Where, capture, patch, steer

_EVERY = Where("*", branches="all")


@dataclass
class Runs:
    """A pipeline, a way to call it, and what plain hooks saw of it.

    Attributes:
        pipe: the pipeline.
        run: calls it and returns its latents; the same call gives the same bits, for two samples of
            different prompts. Keywords change arguments of the call.
        order: guidance branches in the order in which rows, or calls, come.
        calls: whether each branch is a denoiser call of its own.
        off: keywords for `run` that leave the cond branch alone. None = there is no guidance.
    """

    pipe: Any
    run: Callable[..., Tensor]
    order: tuple[str, ...]
    calls: bool = False
    off: dict[str, Any] | None = None
    masked: set[str] = field(default_factory=set)  # sites whose context came with a mask

    @functools.cached_property
    def sites(self) -> SiteList:
        """Attention sites of the pipeline."""
        return sites(self.pipe)

    @contextmanager
    def hooked(self, hook: Callable[[Site, int, dict[str, Any], Any], Any]) -> Iterator[None]:
        """Call hook(site, number of the call, keywords, output) behind every attention."""
        counts: dict[str, int] = {}

        def behind(site: Site) -> Any:
            def call(module: Any, args: Any, kwargs: Any, out: Any) -> Any:
                number = counts.get(site.name, 0)
                counts[site.name] = number + 1
                named = {**dict(zip(("hidden_states", "context"), args, strict=False)), **kwargs}
                return hook(site, number, named, out)

            return call

        handles = [s.module.register_forward_hook(behind(s), with_kwargs=True) for s in self.sites]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def seen(self, **changes: Any) -> tuple[Tensor, dict[str, list[Tensor]], dict[str, Tensor]]:
        """Result of a run, and by site its outputs and the context of its first call."""
        outputs: dict[str, list[Tensor]] = {site.name: [] for site in self.sites}
        contexts: dict[str, Tensor] = {}
        self.masked = set()

        def note(site: Site, number: int, named: dict[str, Any], out: Any) -> None:
            outputs[site.name].append(tokens_of(out).clone())
            context = named.get("encoder_hidden_states", named.get("context"))
            if context is not None:
                contexts.setdefault(site.name, context.clone())
                if any(k.endswith("mask") and v is not None for k, v in named.items()):
                    self.masked.add(site.name)

        with self.hooked(note):
            return self.run(**changes), outputs, contexts

    @functools.cached_property
    def plain(self) -> tuple[Tensor, dict[str, list[Tensor]], dict[str, Tensor]]:
        """What `seen` says of the plain call."""
        return self.seen()

    def by_branch(self, outputs: list[Tensor]) -> dict[str, Tensor]:
        """Outputs of the calls of a site as {branch: [steps, B, T, C]}."""
        order = self.order
        if self.calls:
            return {b: torch.stack(outputs[i :: len(order)]) for i, b in enumerate(order)}
        return dict(zip(order, torch.stack(outputs).chunk(len(order), 1), strict=True))

    def cond_rows(self, number: int, out: Tensor) -> Tensor:
        """Rows of a call that belong to the cond branch, as a view."""
        if self.calls:
            return out if self.order[number % len(self.order)] == "cond" else out[:0]
        return out.chunk(len(self.order))[self.order.index("cond")]

    @functools.cached_property
    def captured(self) -> Any:
        """A capture of every token of every site; its `result` is what the run returned."""
        found: Any
        with capture(self.pipe, _EVERY, reduce="tokens") as found:
            found.result = self.run()
        return found

    def directions(self) -> dict[str, Tensor]:
        """Return one random direction for each site."""
        generator = torch.Generator().manual_seed(7)
        return {s.name: torch.randn(s.width, generator=generator) for s in self.sites}


def tokens_of(out: Any) -> Tensor:
    """Return the output of an attention module as [R, T, C]."""
    out = out[0] if isinstance(out, tuple) else out
    tokens: Tensor = out.flatten(2).transpose(1, 2) if out.dim() == 4 else out
    return tokens


def _require(truth: bool, message: str) -> None:
    if not truth:
        raise AssertionError(f"contract: {message}")


def _equal(found: Tensor, expected: Tensor, what: str) -> None:
    _require(torch.equal(found, expected), f"expected the same bits of {what}, got others")


def capture_changes_nothing(runs: Runs) -> None:
    """Check that a capture leaves the result and, afterwards, the modules as they were."""
    before = [site.module.processor for site in runs.sites]
    attributes = [set(vars(site.module)) for site in runs.sites]
    plain = runs.plain[0]
    _equal(runs.captured.result, plain, "the result under a capture")
    for site, processor, names in zip(runs.sites, before, attributes, strict=True):
        same = site.module.processor is processor and set(vars(site.module)) == names
        _require(same, f"expected {site} as it was before the capture, got another processor")


def capture_equals_plain_hooks(runs: Runs) -> None:
    """Check steps, branches, samples and values of a capture."""
    equals_hooks(runs, runs.captured, runs.plain[1])


def equals_hooks(runs: Runs, cap: Capture, outputs: dict[str, list[Tensor]]) -> None:
    """Check a capture of every token against what hooks saw."""
    _require(set(cap.branches) == set(runs.order), f"expected branches {runs.order}, got "
             f"{cap.branches}")  # fmt: skip
    for site in runs.sites:
        expected = runs.by_branch(outputs[site.name])
        found = cap[site]
        for place, branch in enumerate(cap.branches):
            _equal(found[:, place], expected[branch], f"{site} in the {branch} branch")


def steps_are_those_of_the_schedule(runs: Runs) -> None:
    """Check the timesteps of a capture against those that `scheduler.step` got."""
    ran: list[float] = []
    scheduler = runs.pipe.scheduler
    step = scheduler.step

    @functools.wraps(step)
    def noted(output: Any, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        ran.append(float(timestep))
        return step(output, timestep, *args, **kwargs)

    scheduler.step = noted
    try:
        with capture(runs.pipe, runs.sites[0]) as cap:
            runs.run()
    finally:
        del scheduler.step
    _close(cap.timesteps, torch.tensor(ran, dtype=torch.float64), "timesteps", 1e-5)


def cond_rows_are_those_without_guidance(runs: Runs) -> None:
    """Check which rows are cond: those of a run without guidance, at its first step."""
    if runs.off is None:
        return
    _, outputs, _ = runs.seen(**runs.off)
    place = runs.captured.branches.index("cond")
    for site in runs.sites:
        alone = outputs[site.name][0]  # latents of the first step do not depend on guidance
        torch.testing.assert_close(
            runs.captured[site][0, place], alone, rtol=1e-3, atol=1e-5 * float(alone.norm())
        )


def contexts_are_those_of_the_sources(runs: Runs) -> None:
    """Check the kinds of the sites, and the contexts that cross-attention reads."""
    cross = [site for site in runs.sites if site.kind == "cross"]
    contexts = runs.plain[2]
    reading = {site.name for site in runs.sites if site.kind != "self"}
    _require(set(contexts) == reading, f"expected contexts at {sorted(reading)} [kinds of the "
             f"sites], got them at {sorted(contexts)}")  # fmt: skip
    if not cross:
        return
    with capture(runs.pipe, Where(cross, branches="cond"), reduce="context") as cap:
        runs.run()
    for site in cross:
        cond = runs.cond_rows(0, contexts[site.name])
        _equal(cap[site][0], cond.float(), f"the context of {site}")


def strength_zero_is_no_steering(runs: Runs) -> None:
    """Check that strength 0 changes no bit."""
    plain = runs.plain[0]
    with steer(runs.pipe, runs.directions(), strength=0.0):
        _equal(runs.run(), plain, "the result at strength 0")


def steering_equals_a_plain_hook(runs: Runs) -> None:
    """Check steering of every site in the cond branch."""
    directions = runs.directions()

    def add(site: Site, number: int, named: dict[str, Any], out: Any) -> Any:
        runs.cond_rows(number, tokens_of(out)).add_(directions[site.name])
        return out

    with runs.hooked(add):
        expected = runs.run()
    with steer(runs.pipe, directions):
        found = runs.run()
    _require(not torch.equal(found, runs.plain[0]), "expected steering to show, got the same bits")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def patching_with_its_own_output_changes_nothing(runs: Runs) -> None:
    """Check that a run whose outputs are put back is the run itself."""
    plain, captured = runs.plain[0], runs.captured
    with patch(runs.pipe, _EVERY, output=captured):
        _equal(runs.run(), plain, "the result patched with its own outputs")


def patching_with_another_output_is_seen(runs: Runs) -> None:
    """Check that the last site, patched with the samples exchanged, changes the result."""
    site = runs.sites[len(runs.sites) - 1]
    plain, other = runs.plain[0], runs.captured[site].flip(2)
    ran = runs.captured.steps
    place = Where(site, branches="all", steps=(ran[0], ran[-1] + 1))
    with patch(runs.pipe, place, output=other):
        same = torch.equal(runs.run(), plain)
    _require(not same, f"expected another output of {site} to show, got the same bits")


def patching_a_context_equals_a_plain_hook(runs: Runs) -> None:
    """Check the first cross-attention without a mask, with the prompts exchanged."""
    contexts, masked = runs.plain[2], runs.masked
    site = next((s for s in runs.sites if s.kind == "cross" and s.name not in masked), None)
    if site is None:
        return
    other = runs.cond_rows(0, contexts[site.name]).flip(0)
    number = itertools.count()

    def swap(module: Any, args: Any, kwargs: Any) -> Any:
        name = "context" if "context" in kwargs else "encoder_hidden_states"
        context = (kwargs[name] if name in kwargs else args[1]).clone()
        rows = runs.cond_rows(next(number), context)
        rows.copy_(other[: len(rows)])
        if name in kwargs:
            return args, {**kwargs, name: context}
        return (args[0], context, *args[2:]), kwargs

    handle = site.module.register_forward_pre_hook(swap, with_kwargs=True)
    try:
        expected = runs.run()
    finally:
        handle.remove()
    with patch(runs.pipe, site, context=other):
        found = runs.run()
    _require(not torch.equal(found, runs.plain[0]), "expected another context to show, got the "
             "same bits")  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def timesteps_are_in_the_units_of_the_scheduler(runs: Runs) -> None:
    """Check `Adapter.timestep` against the schedule."""
    _, denoiser, family = find_denoiser(runs.pipe)
    if family.timestep is None:
        return
    read_timestep = family.timestep
    read: list[float] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        timestep = read_timestep(args, kwargs)
        _require(timestep is not None, "expected a timestep in the denoiser call, got none")
        if timestep is not None:
            read.append(float(timestep.reshape(-1)[0]))

    handle = denoiser.register_forward_pre_hook(note, with_kwargs=True)
    try:
        runs.run()
    finally:
        handle.remove()
    per_step = len(runs.order) if runs.calls else 1
    timesteps = runs.pipe.scheduler.timesteps[-(len(read) // per_step) :]
    expected = timesteps.repeat_interleave(per_step).cpu().double()
    _close(torch.tensor(read, dtype=torch.float64), expected, "timesteps of the denoiser", 1e-5)


def _close(found: Tensor, expected: Tensor, what: str, rtol: float) -> None:
    fits = found.shape == expected.shape and torch.allclose(found, expected, rtol=rtol, atol=1e-6)
    _require(fits, f"expected {what} {expected.tolist()}, got {found.tolist()}")


CHECKS: tuple[Callable[[Runs], None], ...] = (
    capture_changes_nothing,
    capture_equals_plain_hooks,
    steps_are_those_of_the_schedule,
    cond_rows_are_those_without_guidance,
    contexts_are_those_of_the_sources,
    strength_zero_is_no_steering,
    steering_equals_a_plain_hook,
    patching_with_its_own_output_changes_nothing,
    patching_with_another_output_is_seen,
    patching_a_context_equals_a_plain_hook,
    timesteps_are_in_the_units_of_the_scheduler,
)
