# SPDX-License-Identifier: Apache-2.0
"""Tracking of a generation: the step, guidance branch and sample that a site cannot see itself.

The step is the place of the timestep in the schedule, so a schedule that is cut at the front (image
to image) counts from where it begins; `scheduler.step` has to agree with it. The number of samples
comes from `prepare_latents`, the branch of each row from the adapter's table. Everything is watched
on instances and put back afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .. import _device
from .adapter import Adapter, CallShape, call_argument, find_denoiser
from .sites import Site
from .watch import Hook, Override


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

    def before_call(self) -> None:
        """Note that a denoiser call begins."""

    def after_call(self, step: int) -> None:
        """Check that every site ran once in the denoiser call that ends."""


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
        self._called = -1  # step of the last denoiser call
        self._repeated = False
        self._by_hand = False
        self._announced: int | None = None  # step that the scheduler was asked about since
        self._state = 0  # counts what the buffers held
        self._states_with_gradient: set[int] = set()
        self._overrides: list[Override] = []
        self._watched: tuple[nn.Module, bool] | None = None
        self._watchers: list[Hook | Override] = []
        self._adapter: Adapter

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
        called, _, self._adapter = find_denoiser(self.pipe)
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
            timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
            place = self._place(timestep)
            if place is not None and self._called == self.step and place != self.step:
                raise RuntimeError(
                    f"sites: expected scheduler.step at step {self.step} [of the denoiser call "
                    f"before it], got the timestep of step {place}"
                )
            result = inner(*args, **kwargs)
            self.step = (self.step if place is None else place) + 1
            self._announced = None
            return result

        return step

    def _around_scaling(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        def scale_model_input(*args: Any, **kwargs: Any) -> Any:
            timestep = kwargs.get("timestep", args[1] if len(args) > 1 else None)
            self._announced = self._place(timestep)
            return inner(*args, **kwargs)

        return scale_model_input

    def _place(self, timestep: Any, *, by_value: bool = True) -> int | None:
        """Return the number of a timestep in the schedule; None if that cannot be told for free.

        An element of the schedule, the usual case, is known by its address: nothing is read from
        a device. Where a value stands there twice (Heun), it is the one at or after this step.
        """
        grid = self._timesteps
        if grid is None or grid.dim() != 1 or self._by_hand:
            return None
        if isinstance(timestep, Tensor):
            if timestep.numel() == 0 or timestep.device != grid.device:
                return None
            same = timestep.untyped_storage().data_ptr() == grid.untyped_storage().data_ptr()
            if same and timestep.dtype == grid.dtype and grid.device.type != "meta":
                place = (timestep.storage_offset() - grid.storage_offset()) // grid.stride(0)
                return place if 0 <= place < len(grid) else None
            if grid.device.type != "cpu" or not by_value:
                return None
            timestep = timestep.reshape(-1)[0].item()
        elif not isinstance(timestep, int | float) or grid.device.type != "cpu":
            return None
        places: list[int] = (grid == timestep).nonzero()[:, 0].tolist()
        return next((p for p in places if p >= self.step), places[-1] if places else None)

    def _locate(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Find the step of a denoiser call."""
        place = self._announced
        if place is None:
            # Not by value: denoisers may get it in other units.
            place = self._place(call_argument(args, kwargs, 1, "timestep"), by_value=False)
        if place is None and self._called < 0:
            begin = getattr(self.scheduler, "begin_index", None)
            place = begin if isinstance(begin, int) and self.step == 0 else None
        if place is not None:
            self.step = place

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
        self._by_hand = True

    def next_step(self) -> None:
        """Do by hand what `scheduler.step` does in a pipeline."""
        self.step += 1

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

    def _start(self, timesteps: Tensor) -> None:
        if len(timesteps) == 0:
            raise ValueError("sites: expected at least one step [num_inference_steps], got 0")
        self._watch_denoiser()
        self._number += 1
        self.step, self._timesteps, self.generation = 0, timesteps, None
        self._by_hand = False
        self._called, self._announced = -1, None
        self._states_with_gradient.clear()

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
        self._locate(args, kwargs)
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
        again, self._repeated = self._repeated or _device.capturing(), False
        if self._called == self.step and not again:
            raise RuntimeError(
                f"sites: expected one denoiser call for each scheduler step [family "
                f"{self._adapter.family}: its branches are rows of one call], got a second one at "
                f"step {self.step}: its branch and rows are not known [the same call again: "
                "tracker.repeat()]"
            )
        if not known:
            self._bind(shape, self._timesteps, args, kwargs)
        if self._published != self.step:
            for observer in self.observers:
                observer.advance(self.step)
            self._published = self.step
            self._state += 1
        for observer in self.observers:
            observer.before_call()
        if torch.is_grad_enabled():
            self._states_with_gradient.add(self._state)
        self._called = self.step

    def _after_denoiser(self, *ignored: Any) -> None:
        for observer in self.observers:
            observer.after_call(self.step)

    def _bind(
        self, shape: CallShape, timesteps: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        # A family of several calls is followed where it makes one: with guidance off.
        table = self._adapter.branches or {1: self._adapter.calls[:1]}
        samples = self.samples
        if samples is None and set(table) == {1}:
            samples = shape.rows  # one branch alone: every row is a sample
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
