# SPDX-License-Identifier: Apache-2.0
"""One shard: written row by row into a temporary file, sealed, opened again and checked."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..io.atomic import naming, sync_folder
from .labels import BroadcastLabels, join_columns
from .manifest import (
    Manifest,
    Shard,
    pack_tail,
    tail_bytes,
    tail_offset,
    unpack_tail,
)

Bytes = NDArray[np.uint8]
_PARTS = 1024  # of one writev, IOV_MAX of Linux


@dataclass
class _Mark:
    """A state of an open shard to which `rollback` returns."""

    rows: int
    labels: int
    checksums: int
    checksum: int
    rows_in_block: int


class OpenShard:
    """A shard under construction; rows go straight to disk, labels wait in memory."""

    def __init__(self, root: Path, file: str, row_bytes: int, block_rows: int) -> None:
        self.root, self.file = root, file
        self.row_bytes, self.block_rows = row_bytes, block_rows
        self.path = root / file
        self.partial = self.path.with_name(self.path.name + ".tmp")
        self.rows = 0
        self._labels: list[BroadcastLabels] = []
        self._checksums: list[int] = []
        self._checksum = 0
        self._rows_in_block = 0
        self._mark = _Mark(0, 0, 0, 0, 0)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        self._descriptor = os.open(self.partial, flags, 0o644)

    @property
    def nbytes(self) -> int:
        """Bytes of rows."""
        return self.rows * self.row_bytes

    @property
    def marked_rows(self) -> int:
        """Rows before the mark."""
        return self._mark.rows

    def append(self, pieces: Sequence[tuple[Bytes, BroadcastLabels]]) -> None:
        """Add rows [n, row_bytes] with their labels, piece by piece, in one write."""
        with naming(self.path):
            _write(self._descriptor, [rows.data.cast("B") for rows, _ in pieces])
        for rows, labels in pieces:
            self._sum(rows)
            self._labels.append(labels)
            self.rows += len(rows)

    def _sum(self, rows: Bytes) -> None:
        start = 0
        while start < len(rows):
            stop = min(len(rows), start + self.block_rows - self._rows_in_block)
            self._checksum = zlib.crc32(rows[start:stop].data, self._checksum)
            self._rows_in_block += stop - start
            if self._rows_in_block == self.block_rows:
                self._close_block()
            start = stop

    def mark(self) -> None:
        """Remember this state for `rollback`."""
        self._mark = _Mark(
            self.rows,
            len(self._labels),
            len(self._checksums),
            self._checksum,
            self._rows_in_block,
        )

    def rollback(self) -> None:
        """Drop what came after the mark, on disk as well."""
        mark = self._mark
        os.ftruncate(self._descriptor, mark.rows * self.row_bytes)
        os.lseek(self._descriptor, 0, os.SEEK_END)
        self.rows = mark.rows
        del self._labels[mark.labels :]
        del self._checksums[mark.checksums :]
        self._checksum, self._rows_in_block = mark.checksum, mark.rows_in_block

    def seal(self) -> Shard:
        """Write the tail, make the file durable and give it its name."""
        if self._rows_in_block:
            self._close_block()
        tail = pack_tail(join_columns(self._labels), np.array(self._checksums, dtype=np.uint32))
        padding = tail_offset(self.rows, self.row_bytes) - self.nbytes
        with naming(self.path):
            _write(self._descriptor, [memoryview(bytes(padding) + tail)])
            os.fsync(self._descriptor)
            self._close()
            os.replace(self.partial, self.path)
            sync_folder(self.path.parent)
        return Shard(self.file, self.rows, zlib.crc32(tail))

    def abandon(self) -> None:
        """Close and remove the file."""
        self._close()
        self.partial.unlink(missing_ok=True)

    def _close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _close_block(self) -> None:
        self._checksums.append(self._checksum)
        self._checksum = self._rows_in_block = 0


def _write(descriptor: int, parts: list[memoryview]) -> None:
    while parts:
        written = os.writev(descriptor, parts[:_PARTS])
        while parts and written >= len(parts[0]):
            written -= len(parts.pop(0))
        if written:
            parts[0] = parts[0][written:]


class MappedShard:
    """A sealed shard, mapped into memory; opening it reads and checks the tail only.

    Raises:
        ValueError: the file is not the one that was sealed; the message names it.
    """

    def __init__(self, root: Path, manifest: Manifest, site: str, shard: Shard) -> None:
        self.shard, self.path = shard, root / shard.file
        self.block_rows = manifest.block_rows(site)
        row_bytes = manifest.row_bytes(site)
        try:
            tail = self._tail(row_bytes)
            shape = (shard.rows, row_bytes)
            self.rows: Bytes = np.memmap(self.path, np.uint8, "r", shape=shape)
        except OSError as error:
            reason = error.strerror or str(error)
            raise ValueError(f"store: expected to read {self.path}, got {reason}") from None
        self.columns, self.checksums = unpack_tail(tail, shard.rows)

    def _tail(self, row_bytes: int) -> bytes:
        count = self.shard.rows
        start = tail_offset(count, row_bytes)
        size = start + tail_bytes(count, self.block_rows)
        found = self.path.stat().st_size
        if found != size:
            raise ValueError(
                f"store: expected {size} bytes in {self.path} [{count} rows], got {found}"
            )
        with open(self.path, "rb") as file:
            file.seek(start)
            tail = file.read()
        _check(tail, self.shard.crc32, f"the labels in {self.path}")
        return tail

    def verify(self) -> None:
        """Read every row and compare the checksums of their blocks.

        Raises:
            ValueError: a block has changed; the message names the file and the rows.
        """
        for (start, stop), crc32 in zip(self.blocks(), self.checksums.tolist(), strict=True):
            what = f"rows {start} to {stop - 1} in {self.path}"
            _check(self.rows[start:stop].data, crc32, what)

    def blocks(self) -> Iterator[tuple[int, int]]:
        """First row and end of every block."""
        count = len(self.rows)
        for start in range(0, count, self.block_rows):
            yield start, min(count, start + self.block_rows)


def _check(content: bytes | memoryview, crc32: int, what: str) -> None:
    found = zlib.crc32(content)
    if found != crc32:
        raise ValueError(f"store: expected CRC-32 {crc32:08x} of {what}, got {found:08x}")


def encode(rows: Tensor, dtype: torch.dtype) -> Bytes:
    """Rows [n, C] as they are stored, [n, row_bytes] bytes.

    int8: q = round(x / s) with s = max |x| / 127 of the row, then s as float32 at the end.
    """
    if dtype != torch.int8:
        return rows.to(dtype).contiguous().view(torch.uint8).numpy()
    x = rows.to(torch.float32)
    scale = x.abs().amax(1) / 127.0
    inverse = torch.where(scale > 0, 1.0 / scale, 0.0)
    width = -(-x.shape[1] // 4) * 4
    packed: Any = torch.zeros(len(x), width + 4, dtype=torch.uint8)
    packed[:, : x.shape[1]] = (
        (x * inverse[:, None]).round_().clamp_(-127, 127).to(torch.int8).view(torch.uint8)
    )
    packed[:, width:] = scale[:, None].contiguous().view(torch.uint8)
    return packed.numpy()


def decode(stored: Tensor, dtype: torch.dtype, width: int) -> Tensor:
    """Rows [n, C] of stored bytes [n, row_bytes] uint8; int8 becomes float32, others a view."""
    if not len(stored):
        return torch.empty(0, width, dtype=torch.float32 if dtype == torch.int8 else dtype)
    if dtype != torch.int8:
        return stored.view(dtype)
    scale = stored[:, -4:].contiguous().view(torch.float32)
    return stored[:, :width].view(torch.int8).to(torch.float32) * scale
