# SPDX-License-Identifier: Apache-2.0
"""Steps that the readers and writers of several formats share."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ...io import tensors as files
from ...io.atomic import write_atomic
from ...io.run_folder import write_json as write_json
from ..architectures.registry import held_by, implementation
from ..config import Provenance, SaeConfig
from ..model import Sae

#: Rows whose norm is this close to 1 were normalised, in whatever precision they were kept.
_UNIT_TOLERANCE = 2.0**-7


def folder_of(path: Path) -> Path:
    """Return the folder of a format: `path` itself, or the one that holds the file `path`."""
    return path.parent if path.is_file() else path


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        FileNotFoundError: there is none.
        ValueError: not a JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"formats: expected a file, got nothing at {path}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"formats: expected JSON in {path}, got {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"formats: expected a JSON object in {path}, got {type(content).__name__}")
    return content


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read every tensor of a safetensors file, as it was stored.

    Raises:
        FileNotFoundError: there is none.
        ValueError: corrupted.
    """
    if not path.is_file():
        raise FileNotFoundError(f"formats: expected a file, got nothing at {path}")
    try:
        return dict(safetensors.torch.load_file(path))
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"formats: expected an intact safetensors file, got {path}: {error}"
        ) from None


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as one safetensors file, whole or not at all; its folder is made if missing."""
    files.write_safetensors(path, tensors, parents=True)


def write_pickle(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a state dict with `torch.save`, whole or not at all."""
    stream = io.BytesIO()
    torch.save({k: cpu(t) for k, t in tensors.items()}, stream)
    write_atomic(path, stream.getvalue(), parents=True)


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Read a state dict that `torch.save` wrote, without running code from the file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is damaged, holds anything but tensors, or asks for code to be run.
    """
    if not path.is_file():
        raise FileNotFoundError(f"formats: expected a file, got nothing at {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asked = str(error).splitlines()[0]
        raise ValueError(
            f"formats: expected a state dict of plain tensors in {path} [a pickle that runs code "
            f"is not opened], got one that is refused: {asked}; where you trust it, load it with "
            "the library that wrote it and torch.save(module.state_dict(), path), or save it as "
            "safetensors"
        ) from None
    except (RuntimeError, EOFError, ValueError) as error:
        raise ValueError(f"formats: expected an intact .pt file, got {path}: {error}") from None
    if not isinstance(content, Mapping) or not all(isinstance(t, Tensor) for t in content.values()):
        raise ValueError(
            f"formats: expected a state dict of tensors in {path}, got {type(content).__name__}"
        )
    return dict(content)


def take(tensors: dict[str, Tensor], *names: str, where: Path) -> Tensor:
    """Remove and return the first tensor of these names.

    Raises:
        ValueError: none is there.
    """
    for name in names:
        if name in tensors:
            return tensors.pop(name)
    raise ValueError(
        f"formats: expected a tensor {' or '.join(names)} in {where}, got {sorted(tensors)}"
    )


def leftover(tensors: Mapping[str, Tensor], where: Path) -> None:
    """Raise if a file holds tensors that nobody asked for: they would change the map.

    Raises:
        ValueError: there are some.
    """
    if tensors:
        raise ValueError(f"formats: expected no further tensors in {where}, got {sorted(tensors)}")


def assemble(
    config: SaeConfig, tensors: Mapping[str, Tensor], source: str, *, extra: Mapping[str, Any]
) -> Sae:
    """Build a dictionary from tensors named as its attributes.

    `config.unit_norm` is set from the rows of `w_dec`.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    unit = (tensors["w_dec"].float().norm(dim=1) - 1).abs().max() < _UNIT_TOLERANCE
    sae = Sae(
        replace(config, unit_norm=bool(unit)),
        provenance=Provenance(source=source, extra=dict(extra)),
    )
    given = {name: tensor.float() for name, tensor in tensors.items()}
    try:
        sae.fill(given)
    except ValueError as error:
        raise ValueError(f"formats: {source}: {error}") from None
    return sae.eval()


def plain(sae: Sae, step: int | None) -> Sae:
    """Return the same map at one step as a float32 dictionary without normalisation.

    Raises:
        ValueError: it normalises each step by itself and no step was given.
    """
    if sae.normaliser.is_identity and sae.target_normaliser.is_identity:
        # Other libraries read one dtype for all tensors, and their configs say float32.
        return sae if sae.w_enc.dtype == torch.float32 else deepcopy(sae).float()
    return sae.folded(step).float()


def with_unit_rows(sae: Sae) -> Sae:
    """Move the norms of the decoder rows into the encoder, for formats whose activations do."""
    sae.normalise_decoder()
    sae.config = replace(sae.config, unit_norm=True)
    return sae


def encoder_biases(sae: Sae, subtracted: Tensor | None) -> dict[str, Tensor]:
    """Return b_enc and the architecture's own tensors of the same map with another b_pre.

    w (x - b_pre) + b_enc = w (x - s) + b_enc + w (s - b_pre), and likewise for a gate.

    Args:
        sae: the dictionary.
        subtracted: s [d_in], what is taken from its input then; None for 0.
    """
    with torch.no_grad():
        start = torch.zeros_like(sae.b_pre) if subtracted is None else subtracted
        shift = sae.w_enc.double() @ (start.double() - sae.b_pre.double())
        return implementation(sae.config.architecture).moved(sae, shift)


def check_held(sae: Sae, format: str) -> None:
    """Refuse an architecture that a format does not hold.

    Raises:
        NotImplementedError: it does not.
    """
    name = sae.config.architecture
    if format not in sae.config.kind.formats:
        raise NotImplementedError(
            f"formats: expected an architecture of {held_by(format)} [those of {format}], got "
            f"{name!r}"
        )


def cpu(tensor: Tensor) -> Tensor:
    """Return a detached copy on the CPU, contiguous, as files need it."""
    return tensor.detach().cpu().contiguous()
