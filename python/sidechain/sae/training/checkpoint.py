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
import re
import shutil
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor

from ...io.atomic import naming, sync_folder, write_text
from ...io.tensors import write_safetensors
from ..normaliser import Normaliser
from .mesh import Mesh
from .state import TrainState

FORMAT = "sidechain.sae.training.checkpoint"
VERSION = 1
KEPT = 2
NORMALISERS = ("normaliser", "target_normaliser")
_NAME = re.compile(r"step-(\d{9})")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: its folder and manifest."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        """Steps done."""
        return int(self.manifest["step"])


def save(folder: Path, state: TrainState, facts: dict[str, Any]) -> Path:
    """Write a checkpoint; every process of a mesh has to call it.

    Args:
        folder: of all checkpoints of the run.
        state: what to keep.
        facts: JSON values for the manifest.

    Returns:
        Folder of this checkpoint; older ones than the last two are deleted.

    Raises:
        OSError: it cannot be written; earlier checkpoints stay.
    """
    mesh, target = state.mesh, folder / f"step-{state.step:09d}"
    partial = folder / f".{target.name}.part"
    if mesh.first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    mesh.barrier()
    entry = _write_slice(partial, state) if mesh.data_rank == 0 else None
    entries = _collect(mesh, entry)
    if mesh.first:
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "step": state.step,
            "dead_total": state.dead_total,
            "files": sorted(entries, key=lambda e: int(e["first"])),
            **facts,
        }
        write_text(partial / "manifest.json", json.dumps(manifest, indent=1))
        if target.exists():  # the same step again, after going back to an earlier checkpoint
            shutil.rmtree(target)
        with naming(target):
            os.replace(partial, target)
            sync_folder(folder)
        prune(folder, keep=KEPT)
    mesh.barrier()
    return target


def latest(folder: Path) -> Checkpoint | None:
    """Return the newest checkpoint that is whole; one that is not is named in a warning."""
    for path in reversed(_complete(folder)):
        try:
            return _open(path)
        except (OSError, ValueError, KeyError) as error:
            warnings.warn(f"checkpoint: {path} left out: {error}", RuntimeWarning, stacklevel=2)
    return None


def prune(folder: Path, *, keep: int) -> None:
    """Delete all checkpoints but the newest ones."""
    for old in _complete(folder)[:-keep]:
        shutil.rmtree(old)


def load(checkpoint: Checkpoint, state: TrainState) -> None:
    """Fill a state from a checkpoint, whatever the number of slices that wrote it.

    Raises:
        ValueError: a tensor is missing or has another shape.
    """
    state.step = checkpoint.step
    state.dead_total = int(checkpoint.manifest["dead_total"])
    stop = state.first + state.size
    for name, tensor, cut in state.named():
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
        "crc32": _checksum(path),
    }


def _collect(mesh: Mesh, entry: dict[str, Any] | None) -> list[dict[str, Any]]:
    entries: list[Any] = [entry]
    if mesh.world > 1:
        entries = [None] * mesh.world
        dist.all_gather_object(entries, entry)
    return [e for e in entries if e is not None]


def _open(folder: Path) -> Checkpoint:
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    found = manifest.get("format"), manifest.get("version")
    if found != (FORMAT, VERSION):
        raise ValueError(f"expected {FORMAT} version {VERSION}, got {found[0]} version {found[1]}")
    for entry in manifest["files"]:
        path = folder / entry["file"]
        if path.stat().st_size != entry["bytes"] or _checksum(path) != entry["crc32"]:
            raise ValueError(f"expected the bytes that were written, got others in {entry['file']}")
    return Checkpoint(folder, manifest)


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


def _complete(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.is_dir() and _NAME.fullmatch(p.name))


def _checksum(path: Path) -> int:
    total = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            total = zlib.crc32(block, total)
    return total
