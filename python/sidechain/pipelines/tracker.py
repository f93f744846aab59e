# SPDX-License-Identifier: Apache-2.0
"""Tracking of a generation: the step, guidance branch and sample that a site cannot see itself.

The step is the place of the timestep in the schedule, so a schedule that is cut at the front (image
to image) counts from where it begins; `scheduler.step` has to agree with it. The number of samples
comes from `prepare_latents`, the branch of each row from the adapter's table. Everything is watched
on instances and put back afterwards.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .. import _device
from .adapter import Adapter, CallShape, find_denoiser
from .generation import Generation, Observer
from .schedule import Schedule
from .watch import Hook, Override


class GenerationTracker:
    """Follows the generations of one pipeline and tells its observers; exists while it has any."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.scheduler = pipe.scheduler
        self.samples: int | None = None
        self.generation: Generation | None = None
        self.observers: list[Observer] = []
        self._schedule = Schedule()
        self._number = 0
        self._call = 0  # number of the denoiser call within its step
        self._branches: set[str] = set()  # those that this generation has had
        self._named: str | None = None  # what the pipeline calls the denoiser call under way
        self._published = (-1, 0)  # step and call that the buffers are for
        self._repeated = False
        self._state = 0  # counts what the buffers held
        self._states_with_gradient: set[int] = set()
        self._overrides: list[Override] = []
        self._watched: tuple[nn.Module, bool] | None = None
        self._watchers: list[Hook | Override] = []
        self._adapter: Adapter

    @property
    def step(self) -> int:
        """Number of the step of the next denoiser call."""
        return self._schedule.step

    # -- life ---------------------------------------------------------------------------------

    def open(self) -> None:
        """Start watching the pipeline."""
        try:
            self._watch_denoiser()
            self._override(self.scheduler, "set_timesteps", self._around_set_timesteps)
            self._override(self.scheduler, "step", self._around_step)
            if hasattr(self.scheduler, "scale_model_input"):
                self._override(self.scheduler, "scale_model_input", self._around_scaling)
            if hasattr(self.pipe, "prepare_latents"):
                self._override(self.pipe, "prepare_latents", self._around_prepare_latents)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Put everything back."""
        self._unwatch()
        while self._overrides:
            self._overrides.pop().restore()

    def _override(
        self, owner: Any, name: str, around: Callable[[Callable[..., Any]], Callable[..., Any]]
    ) -> None:
        self._overrides.append(Override(owner, name, around))

    def _unwatch(self) -> None:
        while self._watchers:
            self._watchers.pop().restore()
        self._watched = None

    def _watch_denoiser(self) -> None:
        """Observe denoiser calls from outside of any compiled region.

        A forward hook inside a compiled region would be traced, or, added late, never fire.
        """
        called, denoiser, self._adapter = find_denoiser(self.pipe)
        compiled = getattr(called, "_compiled_call_impl", None) is not None
        if self._watched == (called, compiled):
            return
        self._unwatch()

        def around(inner: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                self._before_denoiser(called, args, kwargs)
                result = inner(*args, **kwargs)
                self._after_denoiser()
                return result

            return call

        if compiled:
            self._watchers.append(Override(called, "_compiled_call_impl", around))
        else:
            self._watchers.append(Hook(called, self._before_denoiser))
            self._watchers.append(Hook(called, self._after_denoiser, after=True))
        if self._adapter.calls and hasattr(denoiser, "cache_context"):
            self._watchers.append(Override(denoiser, "cache_context", self._around_cache_context))
        self._watched = (called, compiled)

    def _around_cache_context(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        @contextlib.contextmanager
        def cache_context(name: str, *args: Any, **kwargs: Any) -> Iterator[Any]:
            outer, self._named = self._named, name
            try:
                with inner(name, *args, **kwargs) as entered:
                    yield entered
            finally:
                self._named = outer

        return cache_context

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
            self._check_samples(sample.shape[0])
            timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
            place = self._schedule.check(timestep)
            result = inner(*args, **kwargs)
            self._schedule.advance(place)
            return result

        return step

    def _check_samples(self, rows: int) -> None:
        if self.samples is None:
            return
        expected, why = self.samples, "B of prepare_latents"
        if self._adapter.samples is not None and self.generation is not None:
            expected, why = self.generation.shape.rows, "rows of the denoiser"
        if rows != expected:
            raise RuntimeError(
                f"sites: expected {expected} samples in scheduler.step [{why}], got {rows}"
            )

    def _around_scaling(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        def scale_model_input(*args: Any, **kwargs: Any) -> Any:
            self._schedule.announce(kwargs.get("timestep", args[1] if len(args) > 1 else None))
            return inner(*args, **kwargs)

        return scale_model_input

    def begin(self, samples: int, timesteps: Tensor | int = 1) -> None:
        """Announce a generation by hand, for calling the denoiser without its pipeline.

        Args:
            samples: B of the calls to come.
            timesteps: the time grid [steps], or only the number of steps.
        """
        if isinstance(timesteps, int):
            timesteps = torch.arange(timesteps - 1, -1, -1, dtype=torch.float64)
        self.samples = samples
        self._start(timesteps, by_hand=True)

    def next_step(self) -> None:
        """Do by hand what `scheduler.step` does in a pipeline."""
        self._schedule.step += 1

    def repeat(self) -> None:
        """Let the next denoiser call be that of this step once more (warming up, CUDA graphs)."""
        self._repeated = True

    def touch(self) -> None:
        """Note that buffers of a tap have changed."""
        self._state += 1

    def recomputed(self) -> None:
        """Refuse what a gradient checkpoint computes again once the buffers have moved on.

        Raises:
            RuntimeError: steps, strengths or vectors are not those of the forward pass.
        """
        if self._states_with_gradient != {self._state}:
            raise RuntimeError(
                "sites: expected backward before the next step or change of a tap [gradient "
                "checkpoints compute their part again, with the step and strength of now], got it "
                f"at step {self.step} after other calls: begin a generation for each backward, or "
                "disable gradient checkpointing"
            )

    def invalidate(self) -> None:
        """Have every observer bound again at the next denoiser call."""
        self.generation = None

    def _start(self, timesteps: Tensor, *, by_hand: bool = False) -> None:
        self._schedule.start(timesteps, by_hand=by_hand)
        self._watch_denoiser()
        self._number += 1
        self.generation = None
        self._branches.clear()
        self._states_with_gradient.clear()

    def _before_denoiser(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if self.pipe.scheduler is not self.scheduler:
            raise RuntimeError(
                "sites: expected the scheduler that was there when the taps were attached, got a "
                "new one: attach the taps after replacing pipe.scheduler"
            )
        schedule = self._schedule
        if schedule.timesteps is None:
            raise RuntimeError(
                "sites: expected a generation [scheduler.set_timesteps, or tracker.begin(samples, "
                "timesteps) to call the denoiser by hand], got a denoiser call outside of one"
            )
        schedule.locate(self._adapter, getattr(self.scheduler, "begin_index", None), args, kwargs)
        if schedule.step >= len(schedule.timesteps):
            raise RuntimeError(
                f"sites: expected at most {len(schedule.timesteps)} scheduler steps in this "
                "generation, got a denoiser call after the last: start a new one with tracker.begin"
            )
        shape = self._adapter.shape(args, kwargs)
        known = self.generation is not None and shape == self.generation.shape
        capturing = _device.capturing()
        again, self._repeated = self._repeated or capturing, False
        self._call = self._number_of_call(again)
        now = (schedule.step, self._call)
        if capturing and not (known and self._published == now):
            raise RuntimeError(
                "sites: expected an eager denoiser call of these shapes at this step before a CUDA "
                "graph is captured [it makes and fills the buffers of the taps, which replays "
                "would fill again], got the first one within the capture"
            )
        if not known:
            self._bind(shape, schedule.timesteps, args, kwargs)
        if self._published != now:
            # What was made in inference mode could not be filled outside of it later.
            with torch.inference_mode(False), torch.no_grad():
                for observer in self.observers:
                    observer.advance(*now)
            self._published = now
            self._state += 1
        for observer in self.observers:
            observer.before_call()
        if torch.is_grad_enabled():
            self._states_with_gradient.add(self._state)
        schedule.called = schedule.step

    def _number_of_call(self, again: bool) -> int:
        """Return which of the calls of its step a denoiser call is.

        Raises:
            RuntimeError: the family makes no further call, or not this one.
        """
        calls, same_step = self._adapter.calls, self._schedule.called == self._schedule.step
        if same_step and again:
            return self._call
        number = self._call + 1 if same_step else 0
        if self._named in calls:
            named = calls.index(self._named)
            if named < number:
                raise RuntimeError(
                    f"sites: expected one {self._named} call of the denoiser for each scheduler "
                    f"step, got another at step {self.step} [the same call again: tracker.repeat()]"
                )
            return named
        if number >= max(len(calls), 1):
            allowed = f"{len(calls)} denoiser calls" if calls else "one denoiser call"
            known = f"{' and '.join(calls)}" if calls else "its branches are rows of one call"
            raise RuntimeError(
                f"sites: expected {allowed} for each scheduler step [family "
                f"{self._adapter.family}: {known}], got another one at step {self.step}: "
                "its branch and rows are not known [the same call again: tracker.repeat()]"
            )
        return number

    def _after_denoiser(self, *ignored: Any) -> None:
        for observer in self.observers:
            observer.after_call(self.step)

    def _bind(
        self, shape: CallShape, timesteps: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        samples, calls = self._calls(shape, args, kwargs)
        if self._adapter.verify is not None:
            self._adapter.verify(args, kwargs, samples, calls[self._call])
        elsewhere = set(self._branches)
        if self._adapter.late_guidance:
            elsewhere.update(b for branches in self._adapter.branches.values() for b in branches)
        self.generation = Generation(
            number=self._number,
            samples=samples,
            steps=len(timesteps),
            calls=calls,
            shape=shape,
            timesteps=timesteps.detach().to("cpu", torch.float64),
            sigmas=self._sigmas(len(timesteps)),
            adapter=self._adapter,
            elsewhere=frozenset(elsewhere),
        )
        self._branches.update(self.generation.branches)
        try:
            for observer in self.observers:
                observer.bind(self.generation)
        except BaseException:
            self.generation = None
            raise
        self._published = (-1, 0)

    def _calls(
        self, shape: CallShape, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[int, tuple[tuple[str, ...], ...]]:
        """Return the samples of a generation, and the branches of each call of a step."""
        adapter, samples = self._adapter, self.samples
        table = {1: adapter.calls[:1]} if adapter.calls else adapter.branches
        if adapter.samples is not None and not self._schedule.by_hand:
            self.samples = samples = adapter.samples(args, kwargs)
        elif samples is None and set(table) == {1}:
            samples = shape.rows  # every row is a sample
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
        if adapter.calls:
            return samples, tuple((branch,) for branch in adapter.calls)
        return samples, (table[per_sample],)

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


def observers(pipe: Any) -> list[Observer]:
    """Return all that observe a pipeline, in the order in which they came."""
    return [o for tracker in _OPEN.values() if tracker.pipe is pipe for o in tracker.observers]


def release(pipe: Any, observer: Observer) -> None:
    """Take an observer out; the last one closes the GenerationTracker."""
    for key, tracker in list(_OPEN.items()):
        if tracker.pipe is pipe and observer in tracker.observers:
            tracker.observers.remove(observer)
            if not tracker.observers:
                del _OPEN[key]
                tracker.close()
            return
