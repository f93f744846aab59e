# SPDX-License-Identifier: Apache-2.0
"""Directions for steering, checked against a pipeline."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..pipelines import Generation, Site, config_hash, execution_device, sites
from .options import BRANCHES, same_device
from .time_axis import TimeAxis


@runtime_checkable
class VectorLike(Protocol):
    """What steering needs of a vector; `sidechain.vectors.SteeringVector` is one."""

    @property
    def tensors(self) -> Mapping[tuple[str, str], Tensor]:
        """(site name, branch) -> [S, C]."""

    @property
    def timesteps(self) -> Tensor | None:
        """Time of each step [S], or None."""

    @property
    def sigmas(self) -> Tensor | None:
        """Noise level of each step [S], or None."""

    @property
    def config_hash(self) -> str:
        """Of the denoiser it was made for, or the empty string."""


Vector = VectorLike | Mapping[Any, Tensor]


class VectorTable:
    """One vector, checked against a pipeline."""

    def __init__(self, pipe: Any, vector: Vector) -> None:
        self.timesteps: Tensor | None = None
        self.sigmas: Tensor | None = None
        self.tensors: dict[tuple[str, str], Tensor] = {}  # as given: they may be trained
        self._warned = False
        if isinstance(vector, VectorLike):
            here = config_hash(pipe)
            if vector.config_hash and vector.config_hash != here:
                raise ValueError(
                    f"steer: expected a vector made for a denoiser with config hash {here} [this "
                    f"pipeline], got {vector.config_hash}"
                )
            self.timesteps, self.sigmas = vector.timesteps, vector.sigmas
            entries: Mapping[Any, Tensor] = vector.tensors
        elif isinstance(vector, Mapping):
            entries = vector
        else:
            raise TypeError(
                f"steer: expected a SteeringVector or {{site: tensor}}, got {type(vector).__name__}"
            )
        named = {key: key[0] if isinstance(key, tuple) else key for key in entries}
        known = sites(pipe, list(named.values()))
        for key, value in entries.items():
            site = known[named[key]]
            branches = key[1:] if isinstance(key, tuple) else BRANCHES
            self._add(site, branches, value, execution_device(pipe, site.module))
        lengths = {1 if t.dim() == 1 else t.shape[0] for t in self.tensors.values()}
        if len(lengths) != 1:
            raise ValueError(
                f"steer: expected vectors with one number of steps, got {sorted(lengths)}"
            )
        self.steps = lengths.pop()
        if self.timesteps is not None and len(self.timesteps) != self.steps:
            raise ValueError(
                f"steer: expected {self.steps} timesteps [steps of the vector], got "
                f"{len(self.timesteps)}"
            )

    def _add(
        self, site: Site, branches: tuple[str, ...], value: Tensor, device: torch.device
    ) -> None:
        if not isinstance(value, Tensor) or not value.dtype.is_floating_point:
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"steer: expected a float tensor [S, C] for {site}, got {got}")
        table = value[None] if value.dim() == 1 else value
        if table.dim() != 2 or table.shape[0] == 0 or table.shape[1] != site.width:
            raise ValueError(
                f"steer: expected a vector of shape [S, {site.width}] [width of {site}], got "
                f"{list(value.shape)}"
            )
        if value.device.type != "cpu" and not same_device(value.device, device):
            raise ValueError(
                f"steer: expected the vector of {site} on cpu or {device} [where the denoiser "
                f"computes], got {value.device}"
            )
        if not bool(torch.isfinite(table).all()):
            raise ValueError(f"steer: expected a finite vector for {site}, got NaN or infinity")
        for branch in branches:
            self.tensors[site.name, branch] = value

    @property
    def trained(self) -> bool:
        """Whether a gradient is wanted for one of the tensors."""
        return any(t.requires_grad for t in self.tensors.values())

    def names(self) -> list[str]:
        """Return the names of the sites, in order."""
        return list(dict.fromkeys(name for name, _ in self.tensors))

    def at(self, site: Site, branch: str) -> Tensor:
        """Return the tensor [S, C] of a site and branch, as it was given.

        Raises:
            ValueError: there is none.
        """
        try:
            value = self.tensors[site.name, branch]
        except KeyError:
            held = sorted(b for n, b in self.tensors if n == site.name)
            raise ValueError(
                f"steer: expected a vector for {site} and the {branch} branch, got "
                f"{'branches ' + str(held) if held else f'sites {self.names()}'}"
            ) from None
        return value[None] if value.dim() == 1 else value

    def on_grid(self, value: Tensor, steps: int, generation: Generation) -> Tensor:
        """Return a tensor [S, C] of this vector at each step of a generation, [steps, C].

        Args:
            value: of `at`.
            steps: of the result: 1 where every vector is one for all steps.
            generation: the generation to come.

        Raises:
            ValueError: the steps do not fit, or the grids do not overlap.
        """
        if self.steps == 1:
            return value.expand(steps, -1)
        if self.timesteps is None:
            if self.steps != generation.steps:
                raise ValueError(
                    f"steer: expected a vector of 1 or {generation.steps} steps [of this "
                    f"generation; it has no timesteps to interpolate over], got {self.steps}"
                )
            return value
        axis = TimeAxis.of("steer: expected a vector", self.timesteps, self.sigmas, generation)
        if not axis.same and not self._warned:
            warnings.warn(
                f"steer: a vector of {self.steps} steps is interpolated over {axis.unit} to the "
                f"{generation.steps} steps of this generation",
                RuntimeWarning,
                stacklevel=2,
            )
            self._warned = True
        return axis.move(value)
