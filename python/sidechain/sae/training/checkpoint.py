# SPDX-License-Identifier: Apache-2.0
"""Checkpoints, from which a run continues bit for bit, on any number of feature slices.

    FOLDER/step-000000400/manifest.json
    FOLDER/step-000000400/features-00000-of-00002.safetensors

A folder has that name only once all its files are complete and on disk: it is written beside it
and renamed. Each slice of the features writes its own file; tensors that every slice holds whole
are in the first one.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor

from ...io.atomic import naming, sync_folder, write_text
from ...io.run_folder import nan_to_none
from ...io.tensors import write_safetensors
from ..normaliser import Normaliser
from .checkpoint_files import (
    FORMAT,
    MANIFEST,
    VERSION,
    check_tensors,
    checksum,
    complete,
    read_manifest,
    step,
)
from .machine import machine
from .mesh import Mesh
from .state import CONTROL, TrainState

KEPT = 2
NORMALISERS = ("normaliser", "target_normaliser")
T = TypeVar("T")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: its folder and manifest."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        """Steps done."""
        return int(self.manifest["step"])

    @property
    def metrics_bytes(self) -> int:
        """Length of the metrics file when it was written; 0 = not known."""
        return int(self.manifest.get("metrics_bytes", 0))


def save(folder: Path, state: TrainState, facts: dict[str, Any]) -> Path:
    """Write a checkpoint; every process of a mesh has to call it.

    Args:
        folder: of all checkpoints of the run.
        state: what to keep.
        facts: JSON values for the manifest.

    Returns:
        Folder of this checkpoint. Older ones than the last two are deleted, and those of later
        steps, which the run did not go on from because they are damaged.

    Raises:
        OSError: it cannot be written, by any of the processes; earlier checkpoints stay.
    """
    mesh, target = state.mesh, folder / f"step-{state.step:09d}"
    partial = folder / f".{target.name}.part"

    def begin() -> None:
        if partial.exists():
            shutil.rmtree(partial)
        with naming(partial):
            partial.mkdir(parents=True)

    def end() -> None:
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "step": state.step,
            "dead_total": state.dead_total,
            "files": sorted(entries, key=lambda e: int(e["first"])),
            "machine": machine(state.device),
            **facts,
        }
        write_text(partial / MANIFEST, json.dumps(nan_to_none(manifest), indent=1))
        if target.exists():  # the same step again, after going back to an earlier checkpoint
            shutil.rmtree(target)
        with naming(target):
            os.replace(partial, target)
            sync_folder(folder)
        for late in complete(folder):
            if step(late) > state.step:
                shutil.rmtree(late)
        prune(folder, keep=KEPT)

    _together(mesh, begin if mesh.first else None)
    own = mesh.data_rank == 0
    entries = _together(mesh, (lambda: _write_slice(partial, state)) if own else None)
    _together(mesh, end if mesh.first else None)
    return target


def prune(folder: Path, *, keep: int) -> None:
    """Delete all checkpoints but the newest ones."""
    for old in complete(folder)[:-keep]:
        shutil.rmtree(old)


def latest(folder: Path, config: dict[str, Any] | None = None) -> Checkpoint | None:
    """Return the newest checkpoint that is whole and finite; others are named in a warning.

    Args:
        folder: of all checkpoints of the run.
        config: of the dictionary that is trained, as JSON values; a checkpoint of another one is
            left out. None = any.
    """
    for path in reversed(complete(folder)):
        try:
            found = Checkpoint(path, read_manifest(path, config))
            check_tensors(path, found.manifest)
            normalisers(found)
            return found
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            warnings.warn(f"checkpoint: {path} left out: {error}", RuntimeWarning, stacklevel=2)
    return None


def load(checkpoint: Checkpoint, state: TrainState) -> None:
    """Fill a state from a checkpoint, whatever the number of slices that wrote it.

    Raises:
        ValueError: a tensor is missing or has another shape.
    """
    state.step = checkpoint.step
    state.dead_total = int(checkpoint.manifest["dead_total"])
    stop = state.first + state.size
    for name, tensor, cut in state.named():
        if name == CONTROL and not _holds(checkpoint, name):
            continue  # the penalty was fixed until here
        tensor.copy_(_read(checkpoint, name, (state.first, stop) if cut else None, tensor))
    mask = torch.zeros(state.size, dtype=torch.bool)
    mask = _read(checkpoint, "dead", (state.first, stop), mask)
    state.dead = mask.nonzero()[:, 0].to(state.device)


def normalisers(checkpoint: Checkpoint) -> tuple[Normaliser, Normaliser | None]:
    """Return the normalisers of the input and, of a transcoder, of the target.

    Raises:
        ValueError: there are none.
    """
    path = checkpoint.folder / checkpoint.manifest["files"][0]["file"]
    tensors = safetensors.torch.load_file(path)
    own, target = (Normaliser.from_tensors(tensors, name) for name in NORMALISERS)
    if own is None:
        raise ValueError(f"checkpoint: expected a normaliser in {path.name}, got none")
    return own, target


def _write_slice(folder: Path, state: TrainState) -> dict[str, Any]:
    mesh = state.mesh
    number = mesh.feature_rank
    tensors = {n: t for n, t, cut in state.named() if cut or number == 0}
    if number == 0:
        for name in NORMALISERS[: 2 if state.config.transcoder else 1]:
            tensors |= getattr(state, name).tensors(name)
    tensors["dead"] = torch.zeros(state.size, dtype=torch.bool, device=state.device)
    tensors["dead"][state.dead] = True
    path = folder / f"features-{number:05d}-of-{mesh.features:05d}.safetensors"
    write_safetensors(path, tensors)
    return {
        "file": path.name,
        "first": state.first,
        "stop": state.first + state.size,
        "bytes": path.stat().st_size,
        "crc32": checksum(path),
    }


def _together(mesh: Mesh, work: Callable[[], T] | None) -> list[T]:
    """Work in every process (None = nothing to do here) and return all results.

    Raises:
        OSError, ValueError: in every process the error of the first one that met one; otherwise
            the others would wait for it without an end.
    """
    if mesh.world == 1:
        return [] if work is None else [work()]
    mine: tuple[Any, Exception | None] = (None, None)
    try:
        mine = (None if work is None else work(), None)
    except (OSError, ValueError) as error:
        mine = (None, error)
    everyone: list[Any] = [None] * mesh.world
    dist.all_gather_object(everyone, mine)
    for _, failed in everyone:
        if failed is not None:
            raise failed
    return [found for found, _ in everyone if found is not None]


def _holds(checkpoint: Checkpoint, name: str) -> bool:
    path = checkpoint.folder / checkpoint.manifest["files"][0]["file"]
    with safetensors.safe_open(path, framework="pt") as file:
        return name in file.keys()  # noqa: SIM118


def _read(checkpoint: Checkpoint, name: str, span: tuple[int, int] | None, like: Tensor) -> Tensor:
    """Read a whole tensor from the first file, or rows [span) from the files that hold them."""
    parts = []
    for entry in checkpoint.manifest["files"]:
        first, stop = (entry["first"], entry["stop"]) if span else (0, 1)
        start, end = span or (0, 1)
        if end <= first or stop <= start:
            continue
        with safetensors.safe_open(checkpoint.folder / entry["file"], framework="pt") as file:
            if name not in file.keys():  # noqa: SIM118
                raise ValueError(f"checkpoint: expected {name} in {entry['file']}, got none")
            if span is None:
                parts.append(file.get_tensor(name))
                break
            rows = file.get_slice(name)
            parts.append(rows[max(start, first) - first : min(end, stop) - first])
    found = torch.cat(parts) if span else parts[0]
    if found.shape != like.shape or found.dtype != like.dtype:
        raise ValueError(
            f"checkpoint: expected {name} of shape {list(like.shape)} and {like.dtype}, got "
            f"{list(found.shape)} and {found.dtype}"
        )
    return found
