# SPDX-License-Identifier: Apache-2.0
"""SteeringVector: directions by site, CFG branch and step, with what is needed to reuse them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from ..io.tensors import read_tensors, write_tensors
from ..pipelines import PromptPairs, SitePattern, config_hash, sites
from ..pipelines.generate import model_name
from ..pipelines.time_grid import resample, same_grid

FORMAT = "sidechain.vector"
FORMAT_VERSION = 1
SEMANTICS = "module output before residual"


@dataclass(frozen=True)
class Provenance:
    """Where a vector comes from.

    Attributes:
        concept: what it stands for.
        method: how it was made.
        model: name or path of the pipeline, with the class of its denoiser.
        config_hash: of the denoiser; "" fits any.
        semantics: what the directions are added to.
        normalised: whether every direction has unit norm.
        positive: number of positive prompts.
        negative: number of negative prompts.
        seeds: of the generations.
        call: arguments of the pipeline calls.
    """

    concept: str = ""
    method: str = ""
    model: str = ""
    config_hash: str = ""
    semantics: str = SEMANTICS
    normalised: bool = False
    positive: int = 0
    negative: int = 0
    seeds: tuple[int, ...] = ()
    call: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, pipe: Any, method: str, pairs: PromptPairs | None, call: Mapping[str, Any]
    ) -> Provenance:
        """Describe a vector made with a pipeline from prompt pairs, as far as they are known."""
        return cls(
            concept="" if pairs is None else pairs.concept,
            method=method,
            model=model_name(pipe),
            config_hash=config_hash(pipe),
            positive=0 if pairs is None else len(pairs),
            negative=0 if pairs is None else len(pairs),
            seeds=() if pairs is None else tuple(pairs.noise),
            call={k: v for k, v in call.items() if isinstance(v, str | int | float | None)},
        )


class SteeringVector:
    """Directions to add at attention sites.

    Args:
        tensors: (site name, branch) -> [S, C]; S is 1 for a direction that holds at every step.
        timesteps: [S], or None where S is 1.
        sigmas: [S], or None.
        provenance: where it comes from.

    Raises:
        TypeError, ValueError: tensors that do not fit each other or the time grid.
    """

    def __init__(
        self,
        tensors: Mapping[tuple[str, str], Tensor],
        *,
        timesteps: Tensor | None = None,
        sigmas: Tensor | None = None,
        provenance: Provenance | None = None,
    ) -> None:
        if not tensors:
            raise ValueError("SteeringVector: expected at least one direction, got none")
        self._tensors = {}
        for key, value in tensors.items():
            if not isinstance(value, Tensor) or not value.dtype.is_floating_point:
                got = value.dtype if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(f"SteeringVector: expected float tensors, got {got} at {key}")
            if value.dim() != 2 or 0 in value.shape:
                raise ValueError(
                    f"SteeringVector: expected [S, C] at {key}, got {list(value.shape)}"
                )
            if value.requires_grad:
                raise NotImplementedError(
                    f"SteeringVector: expected tensors without gradient [it keeps copies; steer "
                    f"with {{site: tensor}} to train one], got requires_grad=True at {key}"
                )
            self._tensors[key] = value.detach().float().contiguous()
        lengths = {t.shape[0] for t in self._tensors.values()}
        if len(lengths) != 1:
            raise ValueError(f"SteeringVector: expected one number of steps, got {sorted(lengths)}")
        self.steps = lengths.pop()
        for name, grid in (("timesteps", timesteps), ("sigmas", sigmas)):
            if grid is not None and grid.shape != (self.steps,):
                raise ValueError(
                    f"SteeringVector: expected {name} of shape [{self.steps}] [steps of the "
                    f"tensors], got {list(grid.shape)}"
                )
        self.timesteps = None if timesteps is None else timesteps.detach().cpu().double()
        self.sigmas = None if sigmas is None else sigmas.detach().cpu().double()
        self.provenance = provenance or Provenance()

    # -- reading --------------------------------------------------------------------------------

    @property
    def tensors(self) -> Mapping[tuple[str, str], Tensor]:
        """(site name, branch) -> [S, C] float32."""
        return self._tensors

    @property
    def config_hash(self) -> str:
        """Of the denoiser it was made for; "" fits any."""
        return self.provenance.config_hash

    @property
    def concept(self) -> str:
        """What it stands for."""
        return self.provenance.concept

    @property
    def sites(self) -> list[str]:
        """Names of the sites, in order."""
        return list(dict.fromkeys(name for name, _ in self._tensors))

    @property
    def branches(self) -> list[str]:
        """CFG branches, in order."""
        return list(dict.fromkeys(branch for _, branch in self._tensors))

    def __getitem__(self, key: str | tuple[str, str]) -> Tensor:
        """Return [S, C] of a site (its "cond" branch) or of (site, branch)."""
        full = (key, "cond") if isinstance(key, str) else key
        try:
            return self._tensors[full]
        except KeyError:
            raise ValueError(
                f"SteeringVector: expected a site of {self.sites} and a branch of {self.branches}, "
                f"got {full}"
            ) from None

    def norms(self) -> dict[tuple[str, str], Tensor]:
        """Return the norm of every direction, [S] for each (site, branch)."""
        return {key: t.norm(dim=-1) for key, t in self._tensors.items()}

    def check(self, pipe: Any) -> None:
        """Raise unless the vector fits a pipeline.

        Raises:
            ValueError: another model, unknown sites, or another width.
        """
        here = config_hash(pipe)
        if self.config_hash and self.config_hash != here:
            raise ValueError(
                f"SteeringVector: expected a denoiser with config hash {self.config_hash} "
                f"[{self.provenance.model or 'the model it was made for'}], got {here}"
            )
        known = sites(pipe, self.sites)
        for (name, _), value in self._tensors.items():
            if value.shape[1] != known[name].width:
                raise ValueError(
                    f"SteeringVector: expected width {value.shape[1]} [of the vector] at {name}, "
                    f"got {known[name].width}"
                )

    def __repr__(self) -> str:
        return (
            f"SteeringVector({self.concept or 'unnamed'!r}, sites={self.sites}, "
            f"branches={self.branches}, steps={self.steps})"
        )

    # -- algebra --------------------------------------------------------------------------------

    def _derived(
        self, tensors: Mapping[tuple[str, str], Tensor], method: str, **changes: Any
    ) -> SteeringVector:
        provenance = replace(self.provenance, method=method, normalised=False, **changes)
        return SteeringVector(
            tensors, timesteps=self.timesteps, sigmas=self.sigmas, provenance=provenance
        )

    def scaled(self, factor: float) -> SteeringVector:
        """Multiply every direction by a number."""
        method = f"{factor} * ({self.provenance.method})"
        return self._derived({k: factor * t for k, t in self._tensors.items()}, method)

    def __neg__(self) -> SteeringVector:
        return self.scaled(-1.0)

    def __add__(self, other: SteeringVector) -> SteeringVector:
        """Add direction by direction; both need the same sites, branches, widths and time grid."""
        if not isinstance(other, SteeringVector):
            return NotImplemented
        shapes = {k: t.shape for k, t in self._tensors.items()}
        others = {k: t.shape for k, t in other._tensors.items()}
        if shapes != others:
            raise ValueError(
                f"SteeringVector: expected equal sites, branches and shapes in a sum, got {self} "
                f"and {other}"
            )
        if self.config_hash and other.config_hash and self.config_hash != other.config_hash:
            raise ValueError(
                f"SteeringVector: expected vectors of one model in a sum, got config hashes "
                f"{self.config_hash} and {other.config_hash}"
            )
        if (self.timesteps is None) != (other.timesteps is None) or (
            self.timesteps is not None
            and other.timesteps is not None
            and not same_grid(self.timesteps, other.timesteps)
        ):
            raise ValueError(
                "SteeringVector: expected equal timesteps in a sum, got different ones: use "
                "resampled"
            )
        method = f"({self.provenance.method}) + ({other.provenance.method})"
        concept = " + ".join(c for c in (self.concept, other.concept) if c)
        total = {k: t + other._tensors[k] for k, t in self._tensors.items()}
        return self._derived(total, method, concept=concept)

    def __sub__(self, other: SteeringVector) -> SteeringVector:
        if not isinstance(other, SteeringVector):
            return NotImplemented
        return self + (-other)

    def normalised(self) -> SteeringVector:
        """Give every direction unit norm; zero stays zero."""
        made = self._derived({k: unit(t) for k, t in self._tensors.items()}, self.provenance.method)
        made.provenance = replace(made.provenance, normalised=True)
        return made

    def mean_over_steps(self) -> SteeringVector:
        """Return one direction for all steps: the mean over them."""
        return SteeringVector(
            {k: t.mean(0, keepdim=True) for k, t in self._tensors.items()},
            provenance=replace(self.provenance, normalised=False),
        )

    def restricted(self, pipe: Any, pattern: SitePattern) -> SteeringVector:
        """Keep the sites that a pattern names.

        Raises:
            ValueError: the pattern names a site the vector does not have.
        """
        wanted = sites(pipe, pattern).names
        missing = [n for n in wanted if n not in self.sites]
        if missing:
            raise ValueError(f"SteeringVector: expected sites of {self.sites}, got {missing}")
        kept = {k: t for k, t in self._tensors.items() if k[0] in wanted}
        made = self._derived(kept, self.provenance.method)
        made.provenance = self.provenance
        return made

    def random_like(self, seed: int, *, per_step: bool = False) -> SteeringVector:
        """Return random directions with the same norm at every site, branch and step.

        Args:
            seed: of the directions.
            per_step: draw one for each step and branch. By default a site has one direction for
                all of them, which adds up over steps as a real one does: the stricter control.
        """
        generator = torch.Generator().manual_seed(seed)
        drawn: dict[str, Tensor] = {}
        made = {}
        for (name, branch), value in self._tensors.items():
            shape = value.shape if per_step else (1, value.shape[1])
            if per_step or name not in drawn:
                drawn[name] = unit(torch.randn(shape, generator=generator, dtype=torch.float64))
            norm = value.double().norm(dim=-1, keepdim=True)
            made[name, branch] = (drawn[name].to(value.device) * norm).float()
        random = self._derived(made, f"random direction, seed {seed}")
        random.provenance = replace(
            random.provenance, normalised=self.provenance.normalised, concept="random"
        )
        return random

    def resampled(self, timesteps: Tensor, sigmas: Tensor | None = None) -> SteeringVector:
        """Move to another time grid, linearly over the timestep; outside the nearest step holds.

        Raises:
            ValueError: the vector has several steps and no timesteps.
        """
        if self.timesteps is None and self.steps > 1:
            raise ValueError(
                "SteeringVector: expected a vector with timesteps to resample, got none"
            )
        source = torch.zeros(1) if self.timesteps is None else self.timesteps
        tensors = {k: resample(t, source, timesteps) for k, t in self._tensors.items()}
        return SteeringVector(
            tensors,
            timesteps=timesteps,
            sigmas=sigmas,
            provenance=replace(self.provenance, normalised=False),
        )

    # -- files ----------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a safetensors file, all or nothing.

        Raises:
            OSError: the place cannot be written.
        """
        tensors = {f"{name}/{branch}": t for (name, branch), t in self._tensors.items()}
        for name, grid in (("timesteps", self.timesteps), ("sigmas", self.sigmas)):
            if grid is not None:
                tensors[name] = grid
        metadata = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "order": [list(key) for key in self._tensors],
            **asdict(self.provenance),
        }
        return write_tensors(path, tensors, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str], pipe: Any = None) -> Self:
        """Read a file written by `save`.

        Args:
            path: the file.
            pipe: pipeline the vector must fit. None = not checked here.

        Raises:
            FileNotFoundError: there is none.
            ValueError: corrupted, another format, or made for another model.
        """
        tensors, metadata = read_tensors("SteeringVector", Path(path), FORMAT, FORMAT_VERSION)
        absent = [key for key in metadata.get("order", ()) if "/".join(key) not in tensors]
        if absent or not metadata.get("order"):
            raise ValueError(f"SteeringVector: expected tensors for {absent}, got none in {path}")
        grids = {name: tensors.pop(name, None) for name in ("timesteps", "sigmas")}
        keys = [(str(name), str(branch)) for name, branch in metadata.pop("order")]
        known = {f.name for f in Provenance.__dataclass_fields__.values()}
        fields = {k: v for k, v in metadata.items() if k in known}
        fields["seeds"] = tuple(fields.get("seeds", ()))
        made = cls(
            {key: tensors["/".join(key)] for key in keys},
            provenance=Provenance(**fields),
            **grids,
        )
        if pipe is not None:
            made.check(pipe)
        return made


def unit(directions: Tensor) -> Tensor:
    """Scale rows to unit norm; zero rows stay zero."""
    norm = directions.double().norm(dim=-1, keepdim=True)
    return torch.where(norm > 0, directions / norm.clamp(min=1e-300), 0.0).to(directions.dtype)
