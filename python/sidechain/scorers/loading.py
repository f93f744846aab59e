# SPDX-License-Identifier: Apache-2.0
"""Load models of transformers from a folder or the hub, with what is wrong in one line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from .._errors import InputError
from ..io.same import digest
from ..zoo.load import quiet


def offline() -> bool:
    """Tell whether files may only come from this machine."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def load_towers(kind: str, path: str, device: str) -> tuple[Any, Any]:
    """Load a model with a text tower and its processor.

    Args:
        kind: "clap" or "clip", the model type of its config.
        path: folder or hub id.
        device: where to put the model; it computes in float32.

    Raises:
        InputError: nothing there, a model of another type, weights that are missing or not finite.
    """
    import transformers

    name = f"--scorer {kind}:{path}"
    local = offline() or Path(path).is_dir()
    try:
        with quiet():
            config = transformers.AutoConfig.from_pretrained(path, local_files_only=local)
            found = getattr(config, "model_type", None)
            if found != kind:
                raise InputError(f"{name}: expected a model of type {kind}, got {found}")
            model_class = getattr(transformers, {"clap": "ClapModel", "clip": "CLIPModel"}[kind])
            model, info = model_class.from_pretrained(
                path, local_files_only=local, output_loading_info=True
            )
            processor = transformers.AutoProcessor.from_pretrained(path, local_files_only=local)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{name}: expected the folder or the hub id of a {kind} model with its processor, got "
            f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        ) from None
    if info["missing_keys"]:
        raise InputError(
            f"{name}: expected all weights of the model, got none for "
            f"{sorted(info['missing_keys'])[0]} and {len(info['missing_keys']) - 1} others"
        )
    check_finite(name, model)
    return model.float().eval().requires_grad_(False).to(device), processor


def check_finite(name: str, model: torch.nn.Module) -> None:
    """Check that no weight is NaN or infinite.

    Raises:
        InputError: one is; the message names it.
    """
    for key, weight in model.state_dict().items():
        if weight.dtype.is_floating_point and not bool(torch.isfinite(weight).all()):
            raise InputError(f"{name}: expected finite weights, got NaN or infinity in {key}")


def files_digest(path: str) -> str:
    """Return the digest of a model's files: of a folder, or of the cached files of a hub id."""
    if Path(path).is_dir():
        return digest(path)
    from huggingface_hub import snapshot_download

    return digest(snapshot_download(path, local_files_only=True))
