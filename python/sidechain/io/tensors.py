# SPDX-License-Identifier: Apache-2.0
"""Own file formats: one safetensors file, everything but the tensors as JSON in its header."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from .._errors import InputError
from .atomic import replacing
from .run_folder import nan_to_none

KEY = "sidechain"  # of the metadata in the header


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]
) -> Path:
    """Write tensors and metadata, all or nothing.

    Args:
        path: of the file.
        tensors: any device and layout.
        metadata: plain values, with `format` and `format_version` among them; NaN becomes null.
    """
    text = json.dumps(nan_to_none(metadata), sort_keys=True, default=str, allow_nan=False)
    return write_safetensors(path, tensors, {KEY: text})


def write_safetensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    header: Mapping[str, str] | None = None,
    *,
    parents: bool = False,
) -> Path:
    """Write a plain safetensors file, all or nothing, without a second copy in memory.

    `parents` makes the folder if it is missing.

    Raises:
        OSError: it cannot be written; the message names the file.
    """
    plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    with replacing(path, parents=parents) as temporary:
        try:
            safetensors.torch.save_file(plain, temporary, dict(header) if header else None)
        except safetensors.SafetensorError as error:
            # safetensors hides errors of the system in a text of its own.
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    return Path(path)


def read_tensors(
    name: str, path: Path, format_: str, version: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return tensors and metadata of a file that `write_tensors` made.

    Args:
        name: caller, for the message.
        path: of the file.
        format_: the expected format.
        version: of the format.

    Raises:
        FileNotFoundError: there is none.
        InputError: corrupted, another format or version.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{name}: expected a file, got nothing at {path}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata: dict[str, Any] = json.loads(header.get(KEY, "{}"))
    except (safetensors.SafetensorError, ValueError, RecursionError) as error:
        raise InputError(
            f"{name}: expected an intact safetensors file, got {path}: {error}"
        ) from error
    if not isinstance(metadata, dict):
        raise InputError(
            f"{name}: expected a JSON object in the header of {path}, got {type(metadata).__name__}"
        )
    if metadata.get("format") != format_:
        raise InputError(
            f"{name}: expected a file of format {format_!r}, got {metadata.get('format')!r} in "
            f"{path}"
        )
    if metadata.get("format_version") != version:
        raise InputError(
            f"{name}: expected format version {version}, got {metadata.get('format_version')!r} "
            f"in {path}"
        )
    return tensors, metadata
