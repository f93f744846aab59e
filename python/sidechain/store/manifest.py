# SPDX-License-Identifier: Apache-2.0
"""The files of a store: names, manifest, layout of a shard.

    FOLDER/manifest.json            sites, dtype, time grid, totals, the list of shards
    FOLDER/prompts-1b851995.json    prompts and seeds, if they are known
    FOLDER/statistics-000007.safetensors
    FOLDER/cross-3/00000.rows       one file for each site and group of transactions

A shard is `rows * row_bytes` bytes of plain row-major data from offset 0 (so `numpy.memmap` reads
it), zeros up to a multiple of 64, then the tail: the label columns, one after the other, then one
CRC-32 (zlib) for each block of rows. The manifest holds the CRC-32 of the tail. Numbers are
little-endian. Only the rename of the manifest makes new shards part of the store.
"""

from __future__ import annotations

import json
import re
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

FORMAT = "sidechain-store"
VERSION = 1
MANIFEST = "manifest.json"
BLOCK_BYTES = 1 << 20
ALIGNMENT = 64
DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
}
#: Label columns in the order of the tail.
COLUMNS: dict[str, np.dtype[Any]] = {
    "step": np.dtype("<u2"),
    "branch": np.dtype("u1"),
    "prompt": np.dtype("<i4"),
    "token": np.dtype("<i4"),
}
Columns = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Shard:
    """One shard as the manifest knows it: file relative to the store, rows, CRC-32 of its tail."""

    file: str
    rows: int
    crc32: int


@dataclass
class SiteEntry:
    """One site as the manifest knows it.

    Attributes:
        width: elements of a row.
        folder: where its shards are, relative to the store.
        rows: in all shards.
        shards: in the order they were written.
    """

    width: int
    folder: str
    rows: int = 0
    shards: list[Shard] = field(default_factory=list)


@dataclass
class Manifest:
    """Contents of the manifest file.

    Attributes:
        dtype: a key of DTYPES.
        sites: by name.
        branches: names of the numbers in the `branch` column.
        timesteps: of every step [S], or None where unknown.
        sigmas: of every step [S], or None.
        block_bytes: rows of a shard are checksummed in blocks of this many bytes at most.
        cursor: number that the last committed transaction came with.
        next_group: number of the next shards.
        statistics: file name and CRC-32.
        prompts: file name and CRC-32, or None.
        provenance: where the rows come from.
    """

    dtype: str
    sites: dict[str, SiteEntry]
    branches: list[str]
    timesteps: list[float] | None = None
    sigmas: list[float] | None = None
    block_bytes: int = BLOCK_BYTES
    cursor: int = 0
    next_group: int = 0
    statistics: dict[str, Any] | None = None
    prompts: dict[str, Any] | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    def row_bytes(self, site: str) -> int:
        """Bytes of a stored row; an int8 row ends with its float32 scale, at a multiple of 4."""
        return row_bytes(self.dtype, self.sites[site].width)

    def block_rows(self, site: str) -> int:
        """Rows under one checksum."""
        return max(1, self.block_bytes // self.row_bytes(site))

    def to_json(self) -> str:
        """Return the text of the manifest file."""
        content = {"format": FORMAT, "version": VERSION, **asdict(self)}
        return json.dumps(content, indent=1, allow_nan=False) + "\n"

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read and check the manifest of a store.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is not one, of another version, or contradicts itself.
        """
        path = folder / MANIFEST
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise FileNotFoundError(
                f"store: expected {MANIFEST} in {folder} [nothing was ever committed there?], got "
                "no such file"
            ) from None
        except UnicodeDecodeError as error:
            raise ValueError(f"store: expected a manifest in {path}, got {error}") from None
        try:
            content = json.loads(text)
            found = content.pop("format"), content.pop("version")
            if found != (FORMAT, VERSION):
                raise ValueError(
                    f"store: expected {FORMAT} version {VERSION} in {path}, got {found[0]} version "
                    f"{found[1]}"
                )
            if "progress" in content:  # the name of the cursor in older stores
                content["cursor"] = content.pop("progress")
            sites = {name: _site(entry) for name, entry in content.pop("sites").items()}
            manifest = cls(sites=sites, **content)
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"store: expected a manifest in {path}, got {error!r}") from None
        manifest._check(path)
        return manifest

    def _check(self, path: Path) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(
                f"store: expected dtype to be one of {', '.join(DTYPES)} in {path}, got "
                f"{self.dtype!r}"
            )
        for name, site in self.sites.items():
            total = sum(shard.rows for shard in site.shards)
            if total != site.rows:
                raise ValueError(
                    f"store: expected {site.rows} rows of {name} in {path} [its total], got "
                    f"{total} in its shards"
                )


def _site(entry: dict[str, Any]) -> SiteEntry:
    shards = [Shard(**shard) for shard in entry["shards"]]
    known = {name: entry[name] for name in ("width", "folder", "rows")}
    return SiteEntry(**known, shards=shards)  # older stores also count rows that were dropped


def row_bytes(dtype: str, width: int) -> int:
    """Bytes of one stored row."""
    if dtype == "int8":
        return -(-width // 4) * 4 + 4
    return width * DTYPES[dtype].itemsize


def site_folder(site: str) -> str:
    """Name of the folder of a site."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", site).strip("-.") or "site"


def tail_offset(rows: int, size: int) -> int:
    """Where the tail of a shard starts, for rows of `size` bytes."""
    return -(-rows * size // ALIGNMENT) * ALIGNMENT


def tail_bytes(rows: int, block_rows: int) -> int:
    """Length of the tail."""
    return rows * sum(c.itemsize for c in COLUMNS.values()) + 4 * -(-rows // block_rows)


def pack_tail(columns: Columns, checksums: NDArray[np.uint32]) -> bytes:
    """Bytes of a tail."""
    parts = [np.ascontiguousarray(columns[k], dtype=d).tobytes() for k, d in COLUMNS.items()]
    return b"".join([*parts, checksums.astype("<u4").tobytes()])


def unpack_tail(tail: bytes, rows: int) -> tuple[Columns, NDArray[np.uint32]]:
    """Label columns [rows] and block checksums of a tail."""
    columns: Columns = {}
    offset = 0
    for name, dtype in COLUMNS.items():
        columns[name] = np.frombuffer(tail, dtype, rows, offset)
        offset += rows * dtype.itemsize
    return columns, np.frombuffer(tail, "<u4", offset=offset)


def read_prompts(folder: Path, manifest: Manifest) -> dict[str, list[Any]]:
    """Prompts and seeds of a store, empty where none were kept.

    Raises:
        ValueError: the file is not the one that the manifest means.
    """
    if manifest.prompts is None:
        return {"prompts": [], "seeds": []}
    path = folder / manifest.prompts["file"]
    content = path.read_bytes() if path.exists() else b""
    if zlib.crc32(content) != manifest.prompts["crc32"]:
        raise ValueError(
            f"store: expected CRC-32 {manifest.prompts['crc32']:08x} of {path}, got "
            f"{zlib.crc32(content):08x}"
        )
    found: dict[str, list[Any]] = json.loads(content)
    return found
