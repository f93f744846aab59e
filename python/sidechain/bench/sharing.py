# SPDX-License-Identifier: Apache-2.0
"""A whole patching sweep and a whole strength sweep: one batch against one generation each.

Baselines use plain PyTorch hooks on the same pipeline, written as well as we can, and none of our
taps or cached contexts:
- `hooks`: one generation for each preset or strength, the clean context known beforehand;
- `hooks, published protocol`: as the public code of arXiv 2602.11910 does it, for every preset a
  clean generation that records what its sites see, then the patched one.
Timed end to end: text encoding, generation, scoring by both scorers. Results must agree first.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .cases import Row
from .machine import Machine

LOCALIZATION, STRENGTH = "localization", "strength sweep"
STEPS, QUICK_STEPS = 12, 2
LEAST, MOST, QUICK_ROUNDS = 3, 9, 2  # timed rounds
STRENGTHS = (-2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0)
# Largest difference of latents, relative to the largest latent: matrix products of a batch round
# differently from those of single rows, and twelve steps add up.
AGREEMENT = 1e-3


@contextlib.contextmanager
def context_hooks(modules: Sequence[nn.Module], clean: Tensor) -> Iterator[None]:
    """Swap the context of the conditional row at some modules by plain forward pre-hooks."""

    def swap(module: nn.Module, args: Any, kwargs: Any) -> Any:
        context = kwargs["encoder_hidden_states"].clone()
        context[1:] = clean
        return args, {**kwargs, "encoder_hidden_states": context}

    with _removed(m.register_forward_pre_hook(swap, with_kwargs=True) for m in modules):
        yield


@contextlib.contextmanager
def recording_hooks(
    modules: Sequence[nn.Module], store: dict[nn.Module, list[Tensor]]
) -> Iterator[None]:
    """Record the context of each module at every step, as a clean generation for patching does."""

    def record(module: nn.Module, args: Any, kwargs: Any) -> None:
        store.setdefault(module, []).append(kwargs["encoder_hidden_states"].detach().clone())

    with _removed(m.register_forward_pre_hook(record, with_kwargs=True) for m in modules):
        yield


@contextlib.contextmanager
def steering_hooks(vectors: Mapping[nn.Module, Tensor], strength: float) -> Iterator[None]:
    """Add strength x vector of the step to the conditional row by plain forward hooks."""
    calls = dict.fromkeys(vectors, 0)

    def add(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        step = calls[module]
        calls[module] += 1
        output[1:] += strength * vectors[module][step]
        return output

    with _removed(m.register_forward_hook(add) for m in vectors):
        yield


@contextlib.contextmanager
def _removed(hooks: Iterator[Any]) -> Iterator[None]:
    handles = list(hooks)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Localize:
    """A patching sweep of one prompt pair: no site, all sites, and each site alone."""

    def __init__(self, pipe: Any, scorers: Mapping[str, Any], steps: int = STEPS) -> None:
        from sidechain import sites
        from sidechain.studies import localization
        from sidechain.studies.localization.presets import single_presets
        from sidechain.studies.localization.run import pairs_of

        self.pipe, self.scorers, self.steps = pipe, scorers, steps
        self.config = localization.LocalizationConfig(out=Path("unused"), pairs=1, steps=steps)
        self.pair = pairs_of(self.config, "drums")[0]
        self.modules = {site.alias: site.module for site in sites(pipe, "cross:*")}
        self.presets = single_presets(list(self.modules))
        self.name = f"{LOCALIZATION}, {len(self.presets)} presets"
        self.ways = {
            "shared": self.shared, "hooks": self.hooks, "hooks, published protocol": self.protocol
        }  # fmt: skip

    def shared(self) -> Tensor:
        """One batch, as the study runs it."""
        from sidechain import contexts, sites
        from sidechain.studies.localization.run import generate
        from sidechain.studies.models import Context, MusicSubject

        count = len(self.presets)
        clean = contexts(self.pipe, [self.pair.clean]).expand(count, -1, -1)
        corrupted = self.pipe.encode_prompt([self.pair.corrupted]).expand(count, -1, -1)
        jobs = [(self.pair, preset) for preset in self.presets]
        source = sites(self.pipe, "cross:*")[0].source
        subject = MusicSubject(self.pipe)
        latents = generate(
            self.config, subject, jobs, {source: Context(clean)}, corrupted, 0
        ).latents  # fmt: skip
        return _read(self.scorers, latents)

    def hooks(self) -> Tensor:
        """One generation for each preset."""
        from sidechain import contexts

        clean = contexts(self.pipe, [self.pair.clean])
        return torch.cat([self._patched(preset, clean) for preset in self.presets])

    def protocol(self) -> Tensor:
        """A clean and a patched generation for each preset."""
        rows = []
        for preset in self.presets:
            chosen = [self.modules[name] for name in preset.sites]
            store: dict[nn.Module, list[Tensor]] = {}
            with recording_hooks(chosen, store):
                _one(self.pipe, self.pair.clean, self.steps)
            clean = store[chosen[0]][0][1:] if chosen else torch.empty(0)
            rows.append(self._patched(preset, clean))
        return torch.cat(rows)

    def _patched(self, preset: Any, clean: Tensor) -> Tensor:

        with context_hooks([self.modules[name] for name in preset.sites], clean):
            latents = _one(self.pipe, self.pair.corrupted, self.steps)
        _read(self.scorers, latents)
        return latents


class Sweep:
    """A strength sweep of one prompt: ten strengths of one vector at two sites."""

    def __init__(
        self,
        pipe: Any,
        scorers: Mapping[str, Any],
        steps: int = STEPS,
        strengths: Sequence[float] = STRENGTHS,
    ) -> None:
        from sidechain import sites
        from sidechain.studies.models import MusicSubject
        from sidechain.studies.steering import SteeringConfig
        from sidechain.studies.steering.run import test_prompts
        from sidechain.studies.vectors.run import VectorConfig, build
        from sidechain.zoo.music.concepts import concept

        self.pipe, self.scorers, self.steps = pipe, scorers, steps
        self.config = SteeringConfig(out=Path("unused"), concept="drums", steps=steps)
        setup = VectorConfig(concept="drums", pairs=2, steps=steps)
        self.vector = build(MusicSubject(pipe), setup, progress=False)
        self.sites = ["cross:2", "cross:3"]
        self.prompts = test_prompts(self.config, concept("drums"), MusicSubject(pipe))[:1]
        self.vectors = {
            site.module: self.vector[site.name, "cond"].to(pipe.device)
            for site in sites(pipe, self.sites)
        }
        self.strengths = strengths
        self.name = f"{STRENGTH}, {len(strengths)} strengths"
        self.ways = {"shared": self.shared, "hooks": self.hooks}

    def shared(self) -> Tensor:
        """One batch, as the study runs it."""
        from sidechain.studies.models import MusicSubject
        from sidechain.studies.steering.run import Row as Job
        from sidechain.studies.steering.run import generate_rows

        jobs = [Job(0, "localized", strength) for strength in self.strengths]
        latents = generate_rows(
            self.config, MusicSubject(self.pipe), self.vector, self.sites, self.prompts, jobs
        ).latents  # fmt: skip
        return _read(self.scorers, latents)

    def hooks(self) -> Tensor:
        """One generation for each strength."""
        rows = []
        for strength in self.strengths:
            with steering_hooks(self.vectors, strength):
                latents = _one(self.pipe, self.prompts[0], self.steps)
            _read(self.scorers, latents)
            rows.append(latents)
        return torch.cat(rows)


def _read(scorers: Mapping[str, Any], latents: Tensor | None) -> Tensor:
    """Score latents, as the studies do, and return them."""
    from sidechain.scorers.zoo import readings

    if latents is None:
        raise RuntimeError("bench: expected a model that leaves latents, got none")
    readings(scorers, latents)
    return latents


def _one(pipe: Any, prompt: str, steps: int) -> Tensor:
    """Latents of one sample from a plain pipeline call."""
    latents: Tensor = pipe(
        prompt_embeds=pipe.encode_prompt([prompt]),
        generator=[_noise()],
        num_inference_steps=steps,
        guidance_scale=3.0,
        output_type="latent",
    ).audios
    return latents


def _noise() -> torch.Generator:
    from sidechain.studies import common

    return torch.Generator().manual_seed(common.noise_seed(0, 0))


def rows(
    machine: Machine, *, only: str = "", seconds: float = 6.0, quick: bool = False
) -> Iterator[list[Row]]:
    """Measure both sweeps.

    Args:
        machine: where.
        only: part of the name of a sweep.
        seconds: for the shared batch of a sweep; all ways get as many rounds as fit, within limits.
        quick: the strength sweep only, two steps and two rounds, to see that everything runs.

    Yields:
        The rows of a sweep. Fact `x shared`: how many times longer than the shared batch.

    Raises:
        AssertionError: the results of a way differ from those of the shared batch.
        ValueError: no sweep has this name.
    """
    from sidechain import zoo

    pipe = zoo.music()
    pipe.to(machine.device)
    pipe.set_progress_bar_config(disable=True)
    scorers = zoo.scorers(machine.device)
    names: dict[str, Callable[..., Localize | Sweep]] = {LOCALIZATION: Localize, STRENGTH: Sweep}
    if quick:
        names = {STRENGTH: partial(Sweep, strengths=STRENGTHS[:2], steps=QUICK_STEPS)}
    chosen = [make for name, make in names.items() if only in name]
    if not chosen:
        raise ValueError(
            f"bench: expected part of the name of a sweep [{', '.join(names)}], got {only!r}"
        )
    for make in chosen:
        sweep = make(pipe, scorers)
        most = QUICK_ROUNDS if quick else MOST
        yield _measured(sweep.name, sweep.ways, seconds, most)


def _measured(
    name: str, ways: Mapping[str, Callable[[], Tensor]], seconds: float, most: int = MOST
) -> list[Row]:
    """Time all ways in turns, after one run of each whose results must agree."""
    results = {way: run() for way, run in ways.items()}
    reference = results["shared"]
    for way, found in results.items():
        error = float((found - reference).abs().max() / reference.abs().max())
        if not error <= AGREEMENT:
            raise AssertionError(
                f"{name}, {way}: expected the latents of the shared batch up to {AGREEMENT:.0e}, "
                f"got a difference of {error:.1e}"
            )
    taken: dict[str, list[float]] = {way: [] for way in ways}
    while len(taken["shared"]) < min(LEAST, most) or (
        sum(taken["shared"]) < seconds and len(taken["shared"]) < most
    ):
        for way, run in ways.items():
            begun = time.perf_counter()
            run()  # scoring waits for the device
            taken[way].append(time.perf_counter() - begun)
    made = []
    shared = statistics.median(taken["shared"])
    for way, times in taken.items():
        row = Row(name, "f32", way, "ours" if way == "shared" else "plain", 0, 0)
        cuts = statistics.quantiles(times, n=5, method="inclusive")  # few: nothing beyond them
        middle = statistics.median(times)
        row.median_us, row.p20_us, row.p80_us = (
            round(1e6 * t, 1) for t in (middle, cuts[0], cuts[3])
        )  # fmt: skip
        row.method, row.facts = "rounds in turns", {"x shared": round(middle / shared, 2)}
        made.append(row)
    return made
