# SPDX-License-Identifier: Apache-2.0
"""Steps that the readers and writers of several formats share."""

from __future__ import annotations

import io
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

from ..._errors import InputError
from ...io import tensors as files
from ...io.atomic import write_atomic
from ...io.run_folder import write_json as write_json
from ..architectures.registry import held_by, implementation
from ..config import Provenance, SaeConfig
from ..model import Sae
from .settings import one_line

#: Rows whose norm is this close to 1 were normalised, in whatever precision they were kept.
_UNIT_TOLERANCE = 2.0**-7


def folder_of(path: Path) -> Path:
    """Return the folder of a format: `path` itself, or the one that holds the file `path`."""
    return path.parent if path.is_file() else path


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
    except OSError:
        raise
    # A header of another shape ends in whatever the parser stumbles over.
    except Exception as error:
        raise InputError(
            f"formats: expected an intact safetensors file, got {path}: {one_line(error)}"
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
        asked = one_line(error)
        raise InputError(
            f"formats: expected a state dict of plain tensors in {path} [a pickle that runs code "
            f"is not opened], got one that is refused: {asked}; where you trust it, load it with "
            "the library that wrote it and torch.save(module.state_dict(), path), or save it as "
            "safetensors"
        ) from None
    except OSError:
        raise
    # A damaged pickle ends in whatever its instructions stumble over.
    except Exception as error:
        raise InputError(
            f"formats: expected an intact .pt file, got {path}: {one_line(error)}"
        ) from None
    if not isinstance(content, Mapping):
        raise InputError(
            f"formats: expected a state dict of tensors in {path}, got {type(content).__name__}"
        )
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise InputError(
                f"formats: expected a state dict of tensors in {path}, got "
                f"{type(tensor).__name__} under {name!r}"
            )
    return dict(content)


def take(tensors: dict[str, Tensor], *names: str, dims: int, where: Path) -> Tensor:
    """Remove and return weights by the first of their names that is there, float32.

    Args:
        tensors: of the file.
        *names: under which it may stand.
        dims: number of dimensions.
        where: the file, for the message.

    Raises:
        InputError: there is none, or it is not a dense float tensor of finite numbers.
    """
    for name in names:
        if name in tensors:
            return _weight(tensors.pop(name), name, dims, where)
    raise InputError(
        f"formats: expected a tensor {' or '.join(names)} in {where}, got {sorted(tensors)}"
    )


def _weight(tensor: Tensor, name: str, dims: int, where: Path) -> Tensor:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        raise InputError(f"formats: expected {name} as a dense tensor in {where}, got another kind")
    if not tensor.is_floating_point():
        got = str(tensor.dtype).removeprefix("torch.")
        raise InputError(f"formats: expected {name} of a float dtype in {where}, got {got}")
    if tensor.dim() != dims or not tensor.numel():
        raise InputError(
            f"formats: expected {name} with {dims} dimensions in {where}, got {list(tensor.shape)}"
        )
    plain = tensor.detach().float()
    bad = int((~plain.isfinite()).sum())
    if bad:
        raise InputError(f"formats: expected finite {name} in {where}, got {bad} NaN or inf")
    return plain


def take_whole(tensors: dict[str, Tensor], name: str, *, dims: int, where: Path) -> list[int]:
    """Remove and return positive whole numbers: one (dims 0) or several (dims 1).

    Raises:
        InputError: something else.
    """
    tensor = tensors.pop(name)
    fine = not tensor.is_floating_point() and not tensor.is_complex() and tensor.dim() == dims
    if not fine or tensor.dtype == torch.bool or not tensor.numel() or bool((tensor < 1).any()):
        shown = tensor.tolist() if tensor.numel() < 20 else list(tensor.shape)
        raise InputError(
            f"formats: expected {name} of whole numbers >= 1 in {where}, got {shown} "
            f"({str(tensor.dtype).removeprefix('torch.')})"
        )
    return [int(number) for number in tensor.reshape(-1).tolist()]


def leftover(tensors: Mapping[str, Tensor], where: Path) -> None:
    """Raise if a file holds tensors that nobody asked for: they would change the map.

    Raises:
        ValueError: there are some.
    """
    if tensors:
        raise InputError(f"formats: expected no further tensors in {where}, got {sorted(tensors)}")


def assemble(
    shape: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    source: str,
    *,
    extra: Mapping[str, Any],
) -> Sae:
    """Build a dictionary from tensors named as its attributes.

    Args:
        shape: fields of its config, but `unit_norm`, which the rows of `w_dec` say.
        tensors: of `take`.
        source: name of the format.
        extra: of its provenance.

    Raises:
        InputError: shapes that do not fit each other.
    """
    unit = (tensors["w_dec"].norm(dim=1) - 1).abs().max() < _UNIT_TOLERANCE
    try:
        sae = Sae(
            SaeConfig(**shape, unit_norm=bool(unit)),
            provenance=Provenance(source=source, extra=dict(extra)),
        )
        sae.fill(tensors)
    except ValueError as error:
        raise InputError(f"formats: {source}: {error}") from None
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
