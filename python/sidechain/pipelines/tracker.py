# SPDX-License-Identifier: Apache-2.0
"""Tracking of a generation: the step, guidance branch and sample that a site cannot see itself.

The step comes from `scheduler.step`, the number of samples from `prepare_latents`, the branch of
each row from the adapter's table. Everything is watched on instances and put back afterwards.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .. import _device
from .adapter import Adapter, CallShape, find_denoiser
from .sites import Site


@dataclass(frozen=True, eq=False)
class Generation:
    """One generation, as it is known at its first denoiser call.

    Attributes:
        number: counts the generations of the GenerationTracker.
        samples: B.
        steps: number of scheduler steps announced.
        branches: guidance branch of each block of B rows.
        shape: of the denoiser call.
        timesteps: [steps] float64 on the CPU.
        sigmas: [steps] float64 on the CPU; None where the scheduler has none.
        adapter: of the family.
        sample_of_row: [R] int64 on the device.
        branch_of_row: [R] int64 on the device, index into `branches`.
    """

    number: int
    samples: int
    steps: int
    branches: tuple[str, ...]
    shape: CallShape
    timesteps: Tensor
    sigmas: Tensor | None
    adapter: Adapter
    sample_of_row: Tensor
    branch_of_row: Tensor

    def rows_of(self, branch: str) -> slice:
        """Return the block of rows of one guidance branch."""
        start = self.branches.index(branch) * self.samples
        return slice(start, start + self.samples)

    def tokens(self, site: Site) -> int:
        """Return T of the output of a site."""
        return self.adapter.tokens(site, self.shape)

    def context_tokens(self, site: Site) -> int:
        """Return S of the context of a site, 0 where it reads none."""
        return self.adapter.context_tokens(site, self.shape)


class Observer(Protocol):
    """What a tap offers to its GenerationTracker."""

    def bind(self, generation: Generation) -> None:
        """Size and fill device buffers; called before the first denoiser call of a generation."""

    def advance(self, step: int) -> None:
        """Point the device buffers at a step; called before the first denoiser call of it."""


class GenerationTracker:
    """Follows the generations of one pipeline and tells its observers; exists while it has any."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.scheduler = pipe.scheduler
        self.samples: int | None = None
        self.step = 0
        self.generation: Generation | None = None
        self.observers: list[Observer] = []
        self._number = 0
        self._timesteps: Tensor | None = None  # None: no generation has begun
        self._published = -1
        self._undo: list[Callable[[], None]] = []
        self._watched: tuple[nn.Module, bool] | None = None
        self._unwatch: Callable[[], None] = lambda: None
        self._adapter: Adapter

    # -- life ---------------------------------------------------------------------------------

    def open(self) -> None:
        """Start watching the pipeline."""
        try:
            self._watch_denoiser()
            self._override(self.scheduler, "set_timesteps", self._around_set_timesteps)
            self._override(self.scheduler, "step", self._around_step)
            if hasattr(self.pipe, "prepare_latents"):
                self._override(self.pipe, "prepare_latents", self._around_prepare_latents)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Put everything back."""
        self._unwatch()
        self._watched = None
        while self._undo:
            self._undo.pop()()

    def _override(
        self, owner: Any, name: str, around: Callable[[Callable[..., Any]], Callable[..., Any]]
    ) -> None:
        attributes = vars(owner)
        had, old = name in attributes, attributes.get(name)
        inner = getattr(owner, name)
        # functools.wraps: pipelines inspect the signature of scheduler.step.
        attributes[name] = functools.wraps(inner)(around(inner))

        def undo() -> None:
            if had:
                attributes[name] = old
            else:
                attributes.pop(name, None)

        self._undo.append(undo)

    def _watch_denoiser(self) -> None:
        """Observe denoiser calls from outside of any compiled region.

        A forward hook inside a compiled region would be traced, or, added late, never fire.
        """
        called, _, self._adapter = find_denoiser(self.pipe)
        compiled = getattr(called, "_compiled_call_impl", None) is not None
        if self._watched == (called, compiled):
            return
        self._unwatch()
        if compiled:
            inner = called._compiled_call_impl

            def call(*args: Any, **kwargs: Any) -> Any:
                self._before_denoiser(called, args, kwargs)
                return inner(*args, **kwargs)  # type: ignore[misc]

            called.__dict__["_compiled_call_impl"] = call
            self._unwatch = functools.partial(
                called.__dict__.__setitem__, "_compiled_call_impl", inner
            )
        else:
            handle = called.register_forward_pre_hook(self._before_denoiser, with_kwargs=True)
            self._unwatch = handle.remove
        self._watched = (called, compiled)

    # -- what the pipeline does ---------------------------------------------------------------

    def _around_set_timesteps(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        def set_timesteps(*args: Any, **kwargs: Any) -> Any:
            result = inner(*args, **kwargs)
            self._start(self.scheduler.timesteps)
            return result

        return set_timesteps

    def _around_prepare_latents(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        def prepare_latents(*args: Any, **kwargs: Any) -> Any:
            result = inner(*args, **kwargs)
            latents = result if isinstance(result, Tensor) else result[0]
            self.samples, self.generation = latents.shape[0], None
            return result

        return prepare_latents

    def _around_step(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            sample = kwargs["sample"] if "sample" in kwargs else args[2]
            if self.samples is not None and sample.shape[0] != self.samples:
                raise RuntimeError(
                    f"sites: expected {self.samples} samples in scheduler.step [B of "
                    f"prepare_latents], got {sample.shape[0]}"
                )
            result = inner(*args, **kwargs)
            self.step += 1
            return result

        return step

    def begin(self, samples: int, timesteps: Tensor | int = 1) -> None:
        """Announce a generation by hand, for calling the denoiser without its pipeline.

        Args:
            samples: B of the calls to come.
            timesteps: the time grid [steps], or only the number of steps.
        """
        if isinstance(timesteps, int):
            timesteps = torch.arange(timesteps - 1, -1, -1, dtype=torch.float64)
        self.samples = samples
        self._start(timesteps)

    def next_step(self) -> None:
        """Do by hand what `scheduler.step` does in a pipeline."""
        self.step += 1

    def invalidate(self) -> None:
        """Have every observer bound again at the next denoiser call."""
        self.generation = None

    def _start(self, timesteps: Tensor) -> None:
        if len(timesteps) == 0:
            raise ValueError("sites: expected at least one step [num_inference_steps], got 0")
        self._watch_denoiser()
        self._number += 1
        self.step, self._timesteps, self.generation = 0, timesteps, None

    def _before_denoiser(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if self.pipe.scheduler is not self.scheduler:
            raise RuntimeError(
                "sites: expected the scheduler that was there when the taps were attached, got a "
                "new one: attach the taps after replacing pipe.scheduler"
            )
        if self._timesteps is None:
            raise RuntimeError(
                "sites: expected a generation [scheduler.set_timesteps, or tracker.begin(samples, "
                "timesteps) to call the denoiser by hand], got a denoiser call outside of one"
            )
        if self.step >= len(self._timesteps):
            raise RuntimeError(
                f"sites: expected at most {len(self._timesteps)} scheduler steps in this "
                "generation, got a denoiser call after the last: start a new one with tracker.begin"
            )
        shape = self._adapter.shape(args, kwargs)
        known = self.generation is not None and shape == self.generation.shape
        if _device.capturing() and not (known and self._published == self.step):
            raise RuntimeError(
                "sites: expected an eager denoiser call of these shapes at this step before a CUDA "
                "graph is captured [it makes and fills the buffers of the taps, which replays "
                "would fill again], got the first one within the capture"
            )
        if not known:
            self._bind(shape, self._timesteps, args, kwargs)
        if self._published != self.step:
            for observer in self.observers:
                observer.advance(self.step)
            self._published = self.step

    def _bind(
        self, shape: CallShape, timesteps: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        samples, table = self.samples, self._adapter.branches
        if samples is None:
            raise RuntimeError(
                "sites: expected the number of samples [pipe.prepare_latents, or tracker.begin], "
                "got a denoiser call before it was known"
            )
        per_sample, rest = divmod(shape.rows, samples)
        if rest or per_sample not in table:
            expected = " or ".join(f"{n * samples} ({' + '.join(p)})" for n, p in table.items())
            raise RuntimeError(
                f"sites: expected {expected} rows in the denoiser [B={samples} from "
                f"prepare_latents], got {shape.rows}"
            )
        branches = table[per_sample]
        if self._adapter.verify is not None:
            self._adapter.verify(args, kwargs, samples, branches)
        rows = torch.arange(shape.rows, device=shape.device)
        self.generation = Generation(
            number=self._number,
            samples=samples,
            steps=len(timesteps),
            branches=branches,
            shape=shape,
            timesteps=timesteps.detach().to("cpu", torch.float64),
            sigmas=self._sigmas(len(timesteps)),
            adapter=self._adapter,
            sample_of_row=rows % samples,
            branch_of_row=rows // samples,
        )
        try:
            for observer in self.observers:
                observer.bind(self.generation)
        except BaseException:
            self.generation = None
            raise
        self._published = -1

    def _sigmas(self, steps: int) -> Tensor | None:
        sigmas = getattr(self.scheduler, "sigmas", None)
        if not isinstance(sigmas, Tensor) or len(sigmas) < steps:
            return None
        return sigmas[:steps].detach().to("cpu", torch.float64)


_OPEN: dict[int, GenerationTracker] = {}


def observe(pipe: Any, observer: Observer) -> GenerationTracker:
    """Register an observer with the GenerationTracker of a pipeline, opening it if need be.

    Raises:
        ValueError: another pipeline that shares the denoiser is being observed.
    """
    _, denoiser, _ = find_denoiser(pipe)
    tracker = _OPEN.get(id(denoiser))
    if tracker is None:
        tracker = GenerationTracker(pipe)
        tracker.open()
        _OPEN[id(denoiser)] = tracker
    elif tracker.pipe is not pipe:
        raise ValueError(
            f"sites: expected one pipeline per denoiser, got {type(pipe).__name__} sharing the "
            f"denoiser of a {type(tracker.pipe).__name__} that has taps attached"
        )
    tracker.observers.append(observer)
    tracker.invalidate()
    return tracker


def release(pipe: Any, observer: Observer) -> None:
    """Take an observer out; the last one closes the GenerationTracker."""
    for key, tracker in list(_OPEN.items()):
        if tracker.pipe is pipe and observer in tracker.observers:
            tracker.observers.remove(observer)
            if not tracker.observers:
                del _OPEN[key]
                tracker.close()
            return
