# SPDX-License-Identifier: Apache-2.0
"""The store as its writer thread sees it: units of rows become durable, all or nothing."""

from __future__ import annotations

import fcntl
import json
import os
import re
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from ..io.atomic import write_atomic
from .labels import BroadcastLabels
from .manifest import DTYPES, MANIFEST, Manifest
from .recount import count, load_statistics
from .shard import OpenShard, decode, encode
from .statistics import Statistics


class Transaction:
    """Appends units to a store; not for use from several threads.

    A unit is complete or absent: rows written since the last `end` are forgotten by `rollback`, by
    a crash and by a full disk. Complete units become part of the store by `commit`, all sites at
    once, by renaming the manifest.
    """

    def __init__(self, folder: Path, manifest: Manifest, shard_bytes: int, seconds: float) -> None:
        self.folder, self.manifest = folder, manifest
        self.shard_bytes, self.seconds = shard_bytes, seconds
        self.dtype = DTYPES[manifest.dtype]
        self._open: dict[str, OpenShard] = {}
        self._statistics = {n: load_statistics(folder, manifest, n) for n in manifest.sites}
        self._unit = {name: Statistics(site.width) for name, site in manifest.sites.items()}
        self._named = named_files(manifest)
        self._cursor = manifest.cursor
        self._committed_at = time.monotonic()

    # -- rows -----------------------------------------------------------------------------------

    def append(self, site: str, pieces: Sequence[tuple[Tensor, BroadcastLabels]]) -> None:
        """Add pieces of a unit: rows [n, C] with their labels.

        Raises:
            ValueError: a row that is not finite in the dtype of the store.
            OSError: from the file system.
        """
        encoded = []
        for rows, labels in pieces:
            if not len(rows):
                continue
            stored = encode(rows, self.dtype)
            kept = decode(torch.from_numpy(stored), self.dtype, rows.shape[1])
            if not count(self._unit[site], kept, labels):
                raise ValueError(
                    f"store: expected finite rows in {self.manifest.dtype} at {site} [float16 ends "
                    "at 65504; bfloat16 and float32 reach 3e38], got NaN or infinity"
                )
            encoded.append((stored, labels))
        if encoded:
            self._shard(site).append(encoded)

    def _shard(self, site: str) -> OpenShard:
        if site not in self._open:
            entry = self.manifest.sites[site]
            (self.folder / entry.folder).mkdir(exist_ok=True)
            self._open[site] = OpenShard(
                self.folder,
                f"{entry.folder}/{self.manifest.next_group:05d}.rows",
                self.manifest.row_bytes(site),
                self.manifest.block_rows(site),
            )
        return self._open[site]

    # -- units ----------------------------------------------------------------------------------

    def end(self, cursor: int | None = None) -> None:
        """Complete a unit; commit if a shard is full or the last commit is long ago."""
        for site, statistics in self._unit.items():
            self._statistics[site].merge(statistics)
            self._unit[site] = Statistics(statistics.width)
        for shard in self._open.values():
            shard.mark()
        if cursor is not None:
            self._cursor = cursor
        full = any(shard.nbytes >= self.shard_bytes for shard in self._open.values())
        if full or time.monotonic() - self._committed_at >= self.seconds:
            self.commit()

    def rollback(self) -> None:
        """Forget the rows of the unfinished unit."""
        for site, statistics in self._unit.items():
            self._unit[site] = Statistics(statistics.width)
        for shard in self._open.values():
            shard.rollback()

    def commit(self) -> None:
        """Make the complete units durable; rows of an unfinished unit must not be there."""
        before = self._named
        for site, shard in list(self._open.items()):
            if shard.rows:
                sealed = shard.seal()
                self.manifest.sites[site].shards.append(sealed)
                self.manifest.sites[site].rows += sealed.rows
            else:
                shard.abandon()
            del self._open[site]
        self.manifest.cursor = self._cursor
        number = self.manifest.next_group
        self.manifest.next_group += 1
        tensors: dict[str, Tensor] = {}
        for site, statistics in self._statistics.items():
            tensors |= statistics.to_tensors(site)
        name = f"statistics-{number:06d}.safetensors"
        content = save(tensors)
        write_atomic(self.folder / name, content)
        self.manifest.statistics = {"file": name, "crc32": zlib.crc32(content)}
        write_atomic(self.folder / MANIFEST, self.manifest.to_json().encode())
        self._committed_at = time.monotonic()
        self._named = named_files(self.manifest)
        for file in before - self._named:
            (self.folder / file).unlink(missing_ok=True)

    def abandon(self) -> None:
        """Leave the store as it was last committed."""
        for shard in self._open.values():
            shard.abandon()
        self._open.clear()
        clean(self.folder, Manifest.read(self.folder))

    # -- facts ----------------------------------------------------------------------------------

    def set_grid(self, timesteps: Sequence[float], sigmas: Sequence[float] | None) -> None:
        """Fix the time grid, or check that it is the one the store has.

        Raises:
            ValueError: another one.
        """
        known = self.manifest.timesteps
        if known is None:
            self.manifest.timesteps = [float(t) for t in timesteps]
            self.manifest.sigmas = None if sigmas is None else [float(s) for s in sigmas]
        elif len(known) != len(timesteps) or not np.allclose(known, timesteps, rtol=1e-4):
            raise ValueError(
                f"store: expected the time grid of {self.folder}, {_grid(known)}, got "
                f"{_grid(timesteps)}"
            )

    def set_prompts(self, prompts: Sequence[str], seeds: Sequence[int]) -> None:
        """Keep the prompts, and commit."""
        content = json.dumps({"prompts": list(prompts), "seeds": list(seeds)}, indent=0).encode()
        checksum = zlib.crc32(content)
        name = f"prompts-{checksum:08x}.json"
        if self.manifest.prompts is not None and self.manifest.prompts["file"] == name:
            return
        write_atomic(self.folder / name, content)
        self.manifest.prompts = {"file": name, "crc32": checksum}
        self.commit()


def _grid(values: Sequence[float]) -> str:
    return f"{len(values)} steps from {values[0]:g} to {values[-1]:g}"


_OURS = re.compile(
    r"(statistics-\d{6}\.safetensors|prompts-[0-9a-f]{8}\.json)"
    r"|\.(statistics-|manifest\.|prompts-).*\.part"
)
_SHARD = re.compile(r"\d{5}\.rows(\.tmp)?")


def named_files(manifest: Manifest) -> set[str]:
    """The files beside the shards that a manifest names."""
    return {entry["file"] for entry in (manifest.statistics, manifest.prompts) if entry}


def clean(folder: Path, manifest: Manifest | None) -> list[str]:
    """Remove what a crash left behind: files of ours that the manifest does not name.

    Args:
        folder: of the store.
        manifest: as it is on disk; None where there is none yet.

    Returns:
        The names of the files removed.
    """
    candidates = [p for p in folder.iterdir() if _OURS.fullmatch(p.name)]
    known: set[str] = set()
    if manifest is not None:
        known = named_files(manifest)
        for site in manifest.sites.values():
            known |= {shard.file for shard in site.shards}
            inside = folder / site.folder
            if inside.is_dir():
                candidates += [p for p in inside.iterdir() if _SHARD.fullmatch(p.name)]
    removed = []
    for path in candidates:
        name = path.relative_to(folder).as_posix()
        if name not in known:
            path.unlink()
            removed.append(name)
    return removed


class Lock:
    """One writer at a time; the kernel lets go of it when the process dies."""

    def __init__(self, folder: Path) -> None:
        self._descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._descriptor)
            raise RuntimeError(
                f"store: expected to be the only writer of {folder}, got another one at work"
            ) from None

    def release(self) -> None:
        """Let others write."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def check_facts(found: Manifest, wanted: Manifest, folder: Path) -> None:
    """Refuse to append to a store of another kind.

    Raises:
        ValueError: dtype, sites, widths or branches differ.
    """

    def facts(manifest: Manifest) -> Mapping[str, Any]:
        widths = {name: site.width for name, site in manifest.sites.items()}
        return {"dtype": manifest.dtype, "sites": widths, "branches": manifest.branches}

    have, want = facts(found), facts(wanted)
    for name, value in have.items():
        if want[name] != value:
            raise ValueError(
                f"store: expected {name} {value} [what {folder} holds], got {want[name]}"
            )
