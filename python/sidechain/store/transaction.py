# SPDX-License-Identifier: Apache-2.0
"""Transactions: rows written together become durable, all of them or none."""

from __future__ import annotations

import json
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
from .manifest import MANIFEST, Manifest
from .options import Storage
from .recount import count, load_statistics
from .shard import OpenShard, decode, encode
from .statistics import Statistics

Item = tuple[str, Any]


class Appender:
    """Appends transactions to a store; not for use from several threads.

    A transaction is complete or absent: rows written since the last `end` are forgotten by
    `rollback`, by a crash and by a full disk. Complete transactions become part of the store by
    `commit`, all sites at once, by renaming the manifest.
    """

    def __init__(self, folder: Path, manifest: Manifest, storage: Storage) -> None:
        self.folder, self.manifest, self.storage = folder, manifest, storage
        self.dtype = storage.dtype
        self._open: dict[str, OpenShard] = {}
        self._statistics = {n: load_statistics(folder, manifest, n) for n in manifest.sites}
        self._unfinished = {name: Statistics(site.width) for name, site in manifest.sites.items()}
        self._named = named_files(manifest)
        self._cursor = manifest.cursor
        self._committed_at = time.monotonic()

    # -- rows -----------------------------------------------------------------------------------

    def append(self, site: str, pieces: Sequence[tuple[Tensor, BroadcastLabels]]) -> None:
        """Add pieces of a transaction: rows [n, C] with their labels.

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
            if not count(self._unfinished[site], kept, labels):
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

    # -- transactions ---------------------------------------------------------------------------

    def end(self, cursor: int | None = None) -> None:
        """Complete a transaction; commit if a shard is full or the last commit is long ago."""
        for site, statistics in self._unfinished.items():
            self._statistics[site].merge(statistics)
            self._unfinished[site] = Statistics(statistics.width)
        for shard in self._open.values():
            shard.mark()
        if cursor is not None:
            self._cursor = cursor
        full = any(shard.nbytes >= self.storage.shard_bytes for shard in self._open.values())
        waited = time.monotonic() - self._committed_at
        if full or waited >= self.storage.commit_seconds:
            self.commit()

    def rollback(self) -> None:
        """Forget the rows of the unfinished transaction."""
        for site, statistics in self._unfinished.items():
            self._unfinished[site] = Statistics(statistics.width)
        for shard in self._open.values():
            shard.rollback()

    def commit(self) -> None:
        """Make the complete transactions durable; there must be no rows of an unfinished one."""
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


class TransactionBatch:
    """Collects rows and ends of transactions, and gives them to the appender together.

    Rows of complete transactions go as one piece for each site. If that fails, it is undone and
    repeated one by one, so that an error costs the transaction in which it happens and those after
    it, no other.
    """

    def __init__(self, appender: Appender) -> None:
        self.appender = appender
        self._items: list[Item] = []
        self._inside = False  # the appender holds rows of a transaction that has not ended

    def add(self, kind: str, content: Any) -> None:
        """Collect ("rows", (rows, ready)) or ("end", cursor)."""
        if kind == "rows":
            rows, ready = content
            if ready is not None:
                ready()
            content = rows
        self._items.append((kind, content))

    def forget(self) -> None:
        """Say that the appender was rolled back."""
        self._inside = False

    def flush(self) -> None:
        """Give everything collected to the appender."""
        items, self._items = self._items, []
        if self._inside:
            # Its first rows are written already and cannot be repeated.
            first = _after_end(items, first=True)
            self._append(items[:first])
            self._end(items[:first])
            items = items[first:]
        last = _after_end(items, first=False)
        try:
            self._append(items[:last])
        except (OSError, ValueError):
            self.appender.rollback()
            for item in items[:last]:
                self._append([item])
                self._end([item])
        else:
            self._end(items[:last])
        self._append(items[last:])
        self._inside = self._inside or any(kind == "rows" for kind, _ in items[last:])

    def _append(self, items: Sequence[Item]) -> None:
        pieces: dict[str, list[tuple[Tensor, BroadcastLabels]]] = {}
        for kind, content in items:
            if kind == "rows":
                for site, piece in content.items():
                    pieces.setdefault(site, []).append(piece)
        for site, found in pieces.items():
            self.appender.append(site, found)

    def _end(self, items: Sequence[Item]) -> None:
        ends = [content for kind, content in items if kind == "end"]
        if ends:
            self.appender.end(next((c for c in reversed(ends) if c is not None), None))
            self._inside = False


def _after_end(items: Sequence[Item], first: bool) -> int:
    """Number of items up to the first or last end of a transaction, with that end.

    Without an end all items belong to the open transaction: all of them for `first`, otherwise 0.
    """
    ends = [place + 1 for place, (kind, _) in enumerate(items) if kind == "end"]
    if first:
        return ends[0] if ends else len(items)
    return ends[-1] if ends else 0


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
    """Remove what a crash left: files with our names that the manifest does not list.

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
