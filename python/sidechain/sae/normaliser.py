# SPDX-License-Identifier: Apache-2.0
"""Input normalisation for each step, as a part of the model.

The variance of the activations of audio models falls by a factor of about 67 along a trajectory;
without a scale for each step the last ones are noise to the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..pipelines.time_grid import resample
from .precision import HALVES

_TENSORS = ("mean", "scale", "steps", "timesteps", "sigmas")  # in the order of the arguments
_GRID = ("timesteps", "sigmas")


class Normaliser(nn.Module):
    """y = (x - mean[s]) / scale[s] for a row of step s, and back.

    Args:
        mean: [S, d] float32.
        scale: [S] float32, positive; E |y|^2 = d where it is fitted.
        steps: [S] int64, ascending: the scheduler step of each entry. None = one entry for
            everything (S = 1), whatever the step.
        timesteps: [S] float64 of these steps, for `resampled`.
        sigmas: [S] float64, for the record.
    """

    mean: Tensor
    scale: Tensor
    steps: Tensor | None
    timesteps: Tensor | None
    sigmas: Tensor | None

    def __init__(
        self,
        mean: Tensor,
        scale: Tensor,
        steps: Tensor | None = None,
        timesteps: Tensor | None = None,
        sigmas: Tensor | None = None,
    ) -> None:
        super().__init__()
        if mean.dim() != 2 or len(mean) < 1 or scale.shape != mean.shape[:1]:
            raise ValueError(
                f"Normaliser: expected mean [S, d] and scale [S], got {list(mean.shape)} and "
                f"{list(scale.shape)}"
            )
        mean, scale = mean.float(), scale.float()
        if not bool((scale > 0).all()):
            raise ValueError("Normaliser: expected positive scales, got others")
        if steps is None and len(mean) > 1:
            raise ValueError(f"Normaliser: expected steps [S={len(mean)}], got None")
        for name, grid in (("steps", steps), ("timesteps", timesteps), ("sigmas", sigmas)):
            if grid is not None and grid.shape != scale.shape:
                raise ValueError(
                    f"Normaliser: expected {name} of shape {list(scale.shape)}, got "
                    f"{list(grid.shape)}"
                )
        if steps is not None and not bool((steps[1:] > steps[:-1]).all()):
            raise ValueError(f"Normaliser: expected ascending steps, got {steps.tolist()}")
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)
        self.register_buffer("steps", None if steps is None else steps.long())
        self.register_buffer("timesteps", None if timesteps is None else timesteps.double())
        self.register_buffer("sigmas", None if sigmas is None else sigmas.double())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move as any module, but keep precision: a mean in bfloat16 is off by 2^-9 of itself."""
        before = {name: getattr(self, name) for name in _TENSORS}
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            moved = getattr(self, name)
            if moved is None or moved.dtype == tensor.dtype:
                continue
            if moved.dtype in HALVES or name in _GRID:
                setattr(self, name, tensor.to(moved.device))
        return self

    @classmethod
    def identity(cls, width: int) -> Normaliser:
        """Return one that changes nothing."""
        return cls(torch.zeros(1, width), torch.ones(1))

    @property
    def is_identity(self) -> bool:
        """Whether it changes nothing."""
        return len(self.scale) == 1 and bool((self.scale == 1).all() and (self.mean == 0).all())

    def entry(self, step: int | Tensor | None) -> int | Tensor:
        """Return the S index of a step, or [N] int64 for a step per row.

        A step that is not in the table raises where it is known on the host; from a device tensor
        it becomes -1, which `normalise` turns into NaN.

        Raises:
            ValueError: no step given though there are several, or an unknown one.
        """
        if self.steps is None:
            return 0
        if step is None:
            if len(self.scale) == 1:
                return 0
            raise ValueError(
                f"Normaliser: expected a step of {self.steps.tolist()} [normalised for each "
                "step], got None"
            )
        wanted = torch.as_tensor(step, device=self.steps.device)
        place = torch.searchsorted(self.steps, wanted).clamp(max=len(self.scale) - 1)
        found = self.steps[place] == wanted
        if found.device.type == "cpu" and not bool(found.all()):
            unknown = wanted if wanted.dim() == 0 else wanted[~found][0]
            raise ValueError(
                f"Normaliser: expected a step of {self.steps.tolist()} (see resampled), got "
                f"{int(unknown)}"
            )
        return int(place) if isinstance(step, int) else torch.where(found, place, -1)

    def normalise(self, x: Tensor, step: int | Tensor | None = None) -> Tensor:
        """Return (x - mean) / scale [N, d] float32 for x [N, d] of any float dtype."""
        mean, scale = self._rows(step)
        return (x.to(mean.dtype) - mean).div_(scale)  # one new tensor, not two

    def restore(self, y: Tensor, step: int | Tensor | None = None) -> Tensor:
        """Return y * scale + mean [N, d]."""
        mean, scale = self._rows(step)
        return y * scale + mean

    def _rows(self, step: int | Tensor | None) -> tuple[Tensor, Tensor]:
        entry = self.entry(step)
        if isinstance(entry, int):
            return self.mean[entry], self.scale[entry]
        # An empty selection of NaN rather than a wrong row: bad steps must not go unseen.
        scale = torch.where(entry >= 0, self.scale[entry.clamp(min=0)], torch.nan)
        return self.mean[entry.clamp(min=0)], scale[..., None]

    def resampled(
        self, timesteps: Tensor, sigmas: Tensor | None = None, steps: Tensor | None = None
    ) -> Normaliser:
        """Move to another time grid: the mean linearly, the scale linearly in its logarithm.

        Args:
            timesteps: [S'] of the other grid.
            sigmas: [S'], for the record.
            steps: [S'] scheduler steps. None = 0, 1, ...

        Raises:
            ValueError: several entries without timesteps.
        """
        grid = torch.as_tensor(timesteps, dtype=torch.float64)
        if self.timesteps is None:
            if len(self.scale) > 1:
                raise ValueError("Normaliser: expected timesteps to resample, got none")
            return Normaliser(self.mean, self.scale)
        mean = resample(self.mean, self.timesteps, grid)
        scale = resample(self.scale.log()[:, None], self.timesteps, grid)[:, 0].exp()
        chosen = torch.arange(len(grid)) if steps is None else steps
        return Normaliser(mean, scale, chosen, grid, sigmas)

    def copy(self) -> Normaliser:
        """Return a copy of its own memory, float32 on the CPU."""
        grid = (getattr(self, name) for name in _TENSORS)
        return Normaliser(*(None if t is None else t.detach().cpu().clone() for t in grid))  # type: ignore[arg-type]

    # -- files ----------------------------------------------------------------------------------

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """Return its tensors as they are named in a file."""
        found = {f"{prefix}.{name}": getattr(self, name) for name in _TENSORS}
        return {name: t for name, t in found.items() if t is not None}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], prefix: str) -> Normaliser | None:
        """Return the normaliser that `tensors` took apart; None if it is not there.

        Raises:
            ValueError: a part of it is missing, unknown or not finite, or its shapes do not fit.
        """
        given = {n.partition(".")[2]: t for n, t in tensors.items() if n.startswith(f"{prefix}.")}
        if not given:
            return None
        lacking = sorted({"mean", "scale"} - given.keys())
        unknown = sorted(given.keys() - set(_TENSORS))
        if lacking or unknown:
            raise ValueError(
                f"Normaliser: expected mean and scale in {prefix} [and no others than "
                f"{', '.join(_TENSORS)}], got {sorted(given)}"
            )
        for name, tensor in given.items():
            flag, number = tensor.dtype == torch.bool, tensor.is_floating_point()
            if flag or tensor.is_complex() or number == (name == "steps"):
                kind = "whole numbers" if name == "steps" else "a float dtype"
                raise ValueError(
                    f"Normaliser: expected {prefix}.{name} of {kind}, got "
                    f"{str(tensor.dtype).removeprefix('torch.')}"
                )
            kept = tensor if name in _GRID else tensor.float()
            if not bool(kept.isfinite().all()):
                raise ValueError(f"Normaliser: expected finite {prefix}.{name}, got NaN or inf")
        return cls(*(given.get(name) for name in _TENSORS))  # type: ignore[arg-type]
