# SPDX-License-Identifier: Apache-2.0
"""The step that a denoiser call belongs to, from the place of its timestep in the schedule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .adapter import Adapter, call_argument


class Schedule:
    """The timesteps of a generation and the step it has reached.

    Attributes:
        timesteps: [steps]; None before the first generation.
        step: number of the step of the next denoiser call.
        called: step of the last denoiser call; -1 before the first.
        by_hand: whether the denoiser is called without its pipeline.
    """

    def __init__(self) -> None:
        self.timesteps: Tensor | None = None
        self.step = 0
        self.called = -1
        self.by_hand = False
        self._announced: int | None = None  # step that the scheduler was asked about since

    def start(self, timesteps: Tensor, *, by_hand: bool = False) -> None:
        """Begin a generation; `by_hand`: the denoiser is called without its pipeline.

        Raises:
            ValueError: no timestep.
        """
        if len(timesteps) == 0:
            raise ValueError("sites: expected at least one step [num_inference_steps], got 0")
        self.timesteps, self.step, self.called = timesteps, 0, -1
        self.by_hand, self._announced = by_hand, None

    def announce(self, timestep: Any) -> None:
        """Note the timestep that the scheduler was asked about before a denoiser call."""
        self._announced = self.place(timestep)

    def locate(
        self, adapter: Adapter, begin: int | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Find the step of a denoiser call.

        Args:
            adapter: of the family.
            begin: step where the scheduler was told to begin.
            args: of the call.
            kwargs: of the call.
        """
        place = self._announced
        if place is None:
            # Not by value: denoisers may get it in other units.
            place = self.place(call_argument(args, kwargs, 1, "timestep"), by_value=False)
        if place is None and self.called < 0 and self.step == 0:
            place = begin if isinstance(begin, int) else self._nearest(adapter, args, kwargs)
        if place is not None:
            self.step = place

    def check(self, timestep: Any) -> int | None:
        """Return the step of a call of `scheduler.step`, None if it cannot be told.

        Raises:
            RuntimeError: it is not the step of the denoiser call before it.
        """
        place = self.place(timestep)
        if place is not None and self.called == self.step and place != self.step:
            raise RuntimeError(
                f"sites: expected scheduler.step at step {self.step} [of the denoiser call "
                f"before it], got the timestep of step {place}"
            )
        return place

    def advance(self, place: int | None) -> None:
        """Go on to the step after `place`, or after this one."""
        self.step = (self.step if place is None else place) + 1
        self._announced = None

    def place(self, timestep: Any, *, by_value: bool = True) -> int | None:
        """Return the number of a timestep in the schedule; None if that cannot be told for free.

        An element of the schedule, the usual case, is known by its address: nothing is read from
        a device. Where a value stands there twice (Heun), it is the one at or after this step.
        """
        grid = self.timesteps
        if grid is None or grid.dim() != 1 or self.by_hand:
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

    def _nearest(
        self, adapter: Adapter, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> int | None:
        """Find the first timestep of a generation by the value that the denoiser gets.

        Read back once a generation, and only where the schedule did not say: one that was cut at
        the front would count from 0 otherwise.
        """
        grid = self.timesteps
        if grid is None or grid.dim() != 1 or self.by_hand or adapter.timestep is None:
            return None
        found = adapter.timestep(args, kwargs)
        if found is None or found.numel() == 0 or found.device.type == "meta":
            return None
        steps = grid.detach().to("cpu", torch.float64)
        value = float(found.reshape(-1)[0])
        distance = (steps - value).abs()
        place = int(distance.argmin())
        # It may have been rounded to bfloat16; what is further off is in other units.
        return place if float(distance[place]) <= 2.0**-8 * abs(value) else None
