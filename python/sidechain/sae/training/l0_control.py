# SPDX-License-Identifier: Apache-2.0
"""The coefficient of a penalty that keeps a given number of features active."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Integral gain times steps: a count that is wrong by a factor of e moves the coefficient by that
# factor in a twentieth of the run. Weights follow about ten steps late, the memory of Adam's mean:
# a gain above a twentieth a step swings.
_INTEGRAL, _MOST = 20.0, 0.05
# The coefficient stays within this factor of the first one: a penalty has no effect long before
# that, and the way back would take too long.
_RANGE = math.log(100.0)
# Answers at once, which keeps the integral from swinging: from a start ten times off (jumprelu,
# 781 steps) L0 ended 7 % off with 1 and 1 % off with 2.
_PROPORTIONAL = 2.0
# Where next to nothing is active, the logarithm of the count says nothing more.
_LEAST = 0.05


class L0Control:
    """Proportional-integral control of the logarithm of the coefficient.

    With L the mean number of active features of a row in a batch and e = log(L / l0) within -1 and
    1, each step does I += g e, and the next one has the coefficient exp(I + 2 e); g = 20 / steps,
    at most 0.05. I stays within a factor of 100 of its start. Everything stays on the device, in
    float64; every process of a mesh computes the same.

    Args:
        l0: active features to keep.
        start: first coefficient.
        steps: of the run.
        device: of the numbers.

    Attributes:
        values: (I, logarithm of the coefficient of the next step) [2] float64.
    """

    def __init__(self, l0: float, start: float, steps: int, device: torch.device) -> None:
        self._goal, self._gain = math.log(l0), min(_MOST, _INTEGRAL / steps)
        self._start = math.log(start)
        self.values = torch.full((2,), self._start, dtype=torch.float64, device=device)

    @property
    def coefficient(self) -> Tensor:
        """Coefficient of the next step, [] float64."""
        return self.values[1].exp()

    def follow(self, active: Tensor, rows: int) -> None:
        """Move the coefficient after a step.

        Args:
            active: number of active features of the whole batch, over all processes.
            rows: of the whole batch.
        """
        count = (active.double() / rows).clamp(min=_LEAST)
        error = (count.log() - self._goal).clamp(-1.0, 1.0)
        moved = self.values[0] + self._gain * error
        integral = moved.clamp(self._start - _RANGE, self._start + _RANGE)
        self.values.copy_(torch.stack([integral, integral + _PROPORTIONAL * error]))
