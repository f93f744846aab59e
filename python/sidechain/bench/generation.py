# SPDX-License-Identifier: Apache-2.0
"""Whole generations of the music model: plain and with taps, eager and in a CUDA graph.

The graph holds one denoiser call. The values of a tap at a step are in device buffers that are
filled before the call, outside of the graph, so one graph serves every step and strength. On a CPU
there are no graphs: the same calls run eagerly, to see that everything works.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import sidechain

from .cases import Row
from .machine import Machine

PROMPT = "jazz with drums"
STEPS, QUICK_STEPS = 20, 2
SAMPLES = (1, 8)
LEAST, MOST = 2, 15
SITES = "cross:*"
# Largest difference of latents, as a share of the largest one: a graph runs the same kernels.
AGREEMENT = 1e-3


class Graph:
    """A denoiser whose calls are replayed from a CUDA graph, one for the shapes of its first call.

    Hooks in front of the module stay outside: they fill buffers that the graph reads.

    Args:
        module: the denoiser; its `forward` is replaced while the graph is in place.
    """

    WARM = 3  # calls on a side stream before the capture, as torch requires

    def __init__(self, module: Any) -> None:
        self.module, self.inner = module, module.forward
        self.graph: torch.cuda.CUDAGraph | None = None
        self.given: list[Tensor] = []
        self.result: Any = None

    def __enter__(self) -> Graph:
        self.module.forward = self._call
        return self

    def __exit__(self, *_: object) -> None:
        del self.module.forward  # the method of the class is visible again

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        fresh = list(_tensors((args, kwargs)))
        if not all(t.is_cuda for t in fresh):
            return self.inner(*args, **kwargs)
        if self.graph is None:
            self._capture(args, kwargs)
        for place, value in zip(self.given, fresh, strict=True):
            place.copy_(value)
        assert self.graph is not None
        self.graph.replay()
        return _map(self.result, Tensor.clone)

    def _capture(self, args: Any, kwargs: Any) -> None:
        args, kwargs = _map((args, kwargs), Tensor.clone)
        self.given = list(_tensors((args, kwargs)))
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(self.WARM):
                self.inner(*args, **kwargs)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.result = self.inner(*args, **kwargs)


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to every tensor in nested lists, tuples and dicts."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: _map(v, change) for name, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_map(v, change) for v in value)
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from (t for v in value.values() for t in _tensors(v))
    elif isinstance(value, (list, tuple)):
        yield from (t for v in value for t in _tensors(v))


class Generations:
    """Ways to generate several samples of one prompt.

    Args:
        pipe: the music model.
        samples: samples of a batch.
        steps: denoiser calls of a sample.
    """

    def __init__(self, pipe: Any, samples: int, steps: int) -> None:
        self.pipe, self.samples, self.steps = pipe, samples, steps
        self.name = f"music-B{samples}-steps{steps}"
        self.text = pipe.encode_prompt([PROMPT]).expand(samples, -1, -1)
        g = torch.Generator().manual_seed(0)
        config = pipe.transformer.config
        shape = (samples, config.in_channels, config.sample_size)
        self.noise = torch.randn(shape, generator=g).to(pipe.device)
        sites = sidechain.sites(pipe, SITES)
        width = pipe.transformer.config.num_attention_heads * (
            pipe.transformer.config.attention_head_dim
        )
        direction = torch.randn(width, generator=g)
        self.vectors = {site.name: (direction / direction.norm()).to(pipe.device) for site in sites}

    def make(self) -> Tensor:
        """One batch of latents."""
        latents: Tensor = self.pipe(
            prompt_embeds=self.text,
            latents=self.noise,
            num_inference_steps=self.steps,
            output_type="latent",
        ).audios
        return latents

    @contextlib.contextmanager
    def taps(self) -> Iterator[None]:
        """Capture a mean at every cross-attention and steer all of them."""
        with (
            sidechain.steer(self.pipe, self.vectors, strength=2.0),
            sidechain.capture(self.pipe, SITES),
        ):
            yield

    def ways(self) -> dict[str, Callable[[], contextlib.AbstractContextManager[Any]]]:
        """Map each way to what is attached while a batch is generated."""

        @contextlib.contextmanager
        def both() -> Iterator[None]:
            with self.taps(), Graph(self.pipe.transformer):
                yield

        return {
            "plain": contextlib.nullcontext,
            "plain, graph": lambda: Graph(self.pipe.transformer),
            "taps": self.taps,
            "taps, graph": both,
        }


def rows(
    machine: Machine, *, only: str = "", seconds: float = 4.0, quick: bool = False
) -> Iterator[list[Row]]:
    """Measure every number of samples, one list of rows for each.

    Args:
        machine: where.
        only: part of the name of a case.
        seconds: for each way.
        quick: two steps and one sample.

    Yields:
        Rows of the ways. Fact `x plain`: how many times longer than plain, in a graph if it is.

    Raises:
        AssertionError: a graph makes other latents than the eager calls, or taps change nothing.
        ValueError: no case has this name.
    """
    from sidechain import zoo

    pipe = zoo.music()
    pipe.to(machine.device)
    pipe.set_progress_bar_config(disable=True)
    sizes, steps = (SAMPLES[:1], QUICK_STEPS) if quick else (SAMPLES, STEPS)
    every = [Generations(pipe, samples, steps) for samples in sizes]
    chosen = [case for case in every if only in case.name]
    if not chosen:
        names = ", ".join(case.name for case in every)
        raise ValueError(f"bench: expected part of the name of a case [{names}], got {only!r}")
    for case in chosen:
        yield measured(case, machine, seconds)


def measured(case: Generations, machine: Machine, seconds: float) -> list[Row]:
    """Time the ways one after the other, each on two batches whose latents are compared first."""
    done: dict[str, Tensor] = {}
    found: list[Row] = []
    for way, around in case.ways().items():
        with around():
            case.make()  # captures the graph, and leaves traces of the warm-up in the statistics
            done[way] = case.make()
            times = _times(case, machine, seconds)
        ours = way.startswith("taps")
        row = Row(case.name, "f32", way, "ours" if ours else "plain", 0, 0)
        row.method = "rounds" if machine.device == "cuda" else "rounds, no graphs on a CPU"
        if machine.device == "cuda" and way.endswith("graph"):
            row.capture = "captured"
        cuts = statistics.quantiles(times, n=5, method="inclusive")
        middle = statistics.median(times)
        row.median_us, row.p20_us, row.p80_us = (
            round(1e6 * t, 1) for t in (middle, cuts[0], cuts[3])
        )  # fmt: skip
        found.append(row)
    for row in found:
        plain = next(r for r in found if r.provider == row.provider.replace("taps", "plain"))
        assert row.median_us is not None
        assert plain.median_us is not None
        row.facts["x plain"] = round(row.median_us / plain.median_us, 3)
    _compare(case.name, done)
    return found


def _times(case: Generations, machine: Machine, seconds: float) -> list[float]:
    taken: list[float] = []
    while len(taken) < LEAST or (sum(taken) < seconds and len(taken) < MOST):
        begun = time.perf_counter()
        case.make()
        if machine.device == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - begun)
    return taken


def _compare(name: str, done: dict[str, Tensor]) -> None:
    scale = float(done["plain"].abs().max())
    for eager in ("plain", "taps"):
        error = float((done[f"{eager}, graph"] - done[eager]).abs().max()) / scale
        if not error <= AGREEMENT:
            raise AssertionError(
                f"{name}, {eager}: expected the same latents from a graph up to {AGREEMENT:.0e}, "
                f"got a difference of {error:.1e}"
            )
    if torch.equal(done["plain"], done["taps"]):
        raise AssertionError(f"{name}: expected taps that steer, got the latents without them")
