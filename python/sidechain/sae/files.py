# SPDX-License-Identifier: Apache-2.0
"""The own file format: one safetensors file, configuration and provenance in its header."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._tensors import read_tensors, write_tensors
from .config import Provenance, SaeConfig
from .normaliser import Normaliser

if TYPE_CHECKING:
    from .model import Sae

FORMAT = "sidechain.sae"
FORMAT_VERSION = 1
WEIGHTS = ("w_enc", "b_enc", "w_dec", "b_dec", "threshold", "b_gate", "r_mag")
GRID = ("mean", "scale", "steps", "timesteps", "sigmas")


def save(sae: Sae, path: str | os.PathLike[str]) -> Path:
    """Write a dictionary, all or nothing; see `Sae.save`."""
    tensors = {name: getattr(sae, name) for name in WEIGHTS if getattr(sae, name) is not None}
    if not sae.config.tied_bias:
        tensors["b_pre"] = sae.b_pre
    tensors |= grid_tensors("normaliser", sae.normaliser)
    if sae.target_normaliser is not sae.normaliser:
        tensors |= grid_tensors("target_normaliser", sae.target_normaliser)
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "config": sae.config.to_json(),
        "provenance": sae.provenance.to_json(),
    }
    return write_tensors(path, tensors, metadata)


def load(path: str | os.PathLike[str], *, device: Any = None) -> Sae:
    """Read a dictionary; see `Sae.load`."""
    from .model import Sae

    tensors, metadata = read_tensors("Sae", Path(path), FORMAT, FORMAT_VERSION)
    try:
        config = SaeConfig.from_json(metadata["config"])
        normaliser = read_grid(tensors, "normaliser")
        target = read_grid(tensors, "target_normaliser")
        sae = Sae(
            config,
            normaliser=normaliser,
            target_normaliser=target,
            provenance=Provenance.from_json(metadata["provenance"]),
        )
        fill(sae, tensors)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"Sae: expected a complete file of format {FORMAT!r}, got {path}: {error}"
        ) from error
    return sae.to(device).eval()


def fill(sae: Sae, tensors: dict[str, Tensor]) -> None:
    """Copy tensors named as in a file into a dictionary.

    Raises:
        ValueError: a tensor is missing, left over, or of another shape.
    """
    wanted = {name: getattr(sae, name) for name in WEIGHTS if getattr(sae, name) is not None}
    if not sae.config.tied_bias:
        wanted["b_pre"] = sae.b_pre
    given = {name: t for name, t in tensors.items() if "." not in name}
    if given.keys() != wanted.keys():
        raise ValueError(f"expected tensors {sorted(wanted)}, got {sorted(given)}")
    with torch.no_grad():
        for name, tensor in wanted.items():
            if tensor.shape != given[name].shape:
                raise ValueError(
                    f"expected {name} of shape {list(tensor.shape)}, got {list(given[name].shape)}"
                )
            tensor.copy_(given[name])


def grid_tensors(prefix: str, normaliser: Normaliser) -> dict[str, Tensor]:
    """Return the tensors of a normaliser as they are named in a file."""
    found = {f"{prefix}.{name}": getattr(normaliser, name) for name in GRID}
    return {name: t for name, t in found.items() if t is not None}


def read_grid(tensors: dict[str, Tensor], prefix: str) -> Normaliser | None:
    """Return the normaliser that `grid_tensors` took apart, None if it is not there."""
    mean, scale, *grid = (tensors.get(f"{prefix}.{name}") for name in GRID)
    return None if mean is None or scale is None else Normaliser(mean, scale, *grid)
