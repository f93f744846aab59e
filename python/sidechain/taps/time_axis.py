# SPDX-License-Identifier: Apache-2.0
"""Moving a table over steps to the time grid of a generation."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..pipelines import Generation
from ..pipelines.time_grid import resample, same_grid


@dataclass(frozen=True)
class TimeAxis:
    """Where the rows of a table lie in time, and where those of a generation do.

    Attributes:
        known: of each row of the table [S], float64.
        wanted: of each step of the generation [steps], float64.
        unit: "sigmas" where both have noise levels, else "timesteps".
    """

    known: Tensor
    wanted: Tensor
    unit: str

    @classmethod
    def of(
        cls, name: str, timesteps: Tensor, sigmas: Tensor | None, generation: Generation
    ) -> TimeAxis:
        """Choose the unit; two schedulers may give the same noise other timesteps.

        Args:
            name: what the table is, "steer: expected a vector", for the message.
            timesteps: of the rows of the table [S].
            sigmas: of the rows of the table [S], or None.
            generation: the generation that needs the table.

        Raises:
            ValueError: the two do not overlap.
        """
        axis = cls(timesteps, generation.timesteps, "timesteps")
        if sigmas is not None and generation.sigmas is not None:
            axis = cls(sigmas, generation.sigmas, "sigmas")
        known, wanted = axis.known, axis.wanted
        if max(known.min(), wanted.min()) > min(known.max(), wanted.max()):
            raise ValueError(
                f"{name} whose {axis.unit} overlap those of this generation "
                f"[{float(wanted.min()):g} to {float(wanted.max()):g}], got "
                f"{float(known.min()):g} to {float(known.max()):g}"
            )
        return axis

    @property
    def same(self) -> bool:
        """Whether the rows of the table are the steps of the generation."""
        return same_grid(self.known, self.wanted)

    def move(self, table: Tensor) -> Tensor:
        """Return the table [S, C] at the steps of the generation [steps, C]."""
        return table if self.same else resample(table, self.known, self.wanted)
