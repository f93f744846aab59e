# SPDX-License-Identifier: Apache-2.0
"""Files of a model: where they are, and the pipeline that is saved in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from .._errors import InputError
from ..scorers.loading import offline
from ..zoo.load import quiet


def load_pipeline(model: str, revision: str | None, dtype: torch.dtype) -> Any:
    """Load a diffusers pipeline from a folder or the hub.

    Raises:
        InputError: it cannot be; one line with the reason.
    """
    from diffusers import DiffusionPipeline

    folder = files_of(model, revision)
    try:
        with quiet():
            return DiffusionPipeline.from_pretrained(folder, dtype=dtype, local_files_only=True)
    except Exception as error:  # of whatever library a part of it comes from
        raise InputError(_wrong(model, error)) from error


def files_of(model: str, revision: str | None = None) -> Path:
    """Return the folder of a model's files, of the hub after they were fetched.

    Raises:
        InputError: no such folder, no such model, or no way to fetch it.
    """
    if Path(model).is_dir():
        if revision is not None:
            raise InputError(f"--revision: expected none for a folder, got {revision!r}")
        if saved_class(model) is None:
            raise InputError(
                f"--model: expected a saved pipeline in {model} [model_index.json], got none"
            )
        return Path(model)
    from diffusers import DiffusionPipeline

    try:
        with quiet():
            found = DiffusionPipeline.download(model, revision=revision, local_files_only=offline())
    except Exception as error:  # network, rights, names: whatever the hub's client raises
        raise InputError(_wrong(model, error)) from error
    return Path(found)


def _wrong(model: str, error: Exception) -> str:
    reason = " ".join(str(error).split())[:300]
    return (
        f"--model: expected a diffusers pipeline in {model}, got {type(error).__name__}: {reason}"
    )


def saved_class(model: str) -> str | None:
    """Return the class of the pipeline that was saved in a folder; None without one."""
    index = Path(model) / "model_index.json"
    try:
        found = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    kind = found.get("_class_name") if isinstance(found, dict) else None
    return kind[-1] if isinstance(kind, list) else kind
