# SPDX-License-Identifier: Apache-2.0
"""Read TensorFlow checkpoints (tensor bundles) without TensorFlow.

A bundle is an index, a LevelDB table from tensor names to small protocol buffers, and shards of raw
little-endian numbers. Formats: tensorflow/core/protobuf/tensor_bundle.proto and
https://github.com/google/leveldb/blob/main/doc/table_format.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

FOOTER_BYTES = 48
MAGIC = 0xDB4775248B80FB57
FLOAT32 = 1  # tensorflow.DT_FLOAT


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: type number, shape, shard, offset and size in bytes."""

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int


def read_bundle(prefix: Path | str) -> dict[str, np.ndarray]:
    """All tensors of the checkpoint `prefix`.index + `prefix`.data-*, by name, float32.

    Raises:
        FileNotFoundError: a file of the bundle is missing.
        NotImplementedError: compressed tables, big-endian bundles or tensors other than float32.
        ValueError: a file that is no bundle or was cut short.
    """
    table = dict(read_table(Path(f"{prefix}.index").read_bytes()))
    if b"" not in table:
        raise ValueError("read_bundle: expected a header [the empty key] in the index, got none")
    header = _fields(table.pop(b""))
    if header.get(2):
        raise NotImplementedError("read_bundle: expected little-endian numbers, got big-endian")
    shards = _number(header, 1)
    data = [Path(f"{prefix}.data-{i:05d}-of-{shards:05d}").read_bytes() for i in range(shards)]
    return {key.decode(): _tensor(key.decode(), _entry(raw), data) for key, raw in table.items()}


def read_table(raw: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of a LevelDB table, in order.

    Raises:
        NotImplementedError: a compressed block.
        ValueError: not a table, or one cut short.
    """
    if len(raw) < FOOTER_BYTES or int.from_bytes(raw[-8:], "little") != MAGIC:
        raise ValueError("read_table: expected a LevelDB table [magic in the last 8 bytes]")
    footer = raw[-FOOTER_BYTES:]
    position = 0
    for _ in range(2):  # skip the handle of the meta index: offset and size
        _, position = _varint(footer, position)
    for _, handle in _block(raw, footer[position:]):
        yield from _block(raw, handle)


def _block(raw: bytes, handle: bytes) -> Iterator[tuple[bytes, bytes]]:
    start, position = _varint(handle, 0)
    size, _ = _varint(handle, position)
    if start + size >= len(raw):
        raise ValueError(f"read_table: expected a block of {size} bytes at {start}, got {len(raw)}")
    if raw[start + size] != 0:
        raise NotImplementedError(
            f"read_table: expected uncompressed blocks, got compression {raw[start + size]}"
        )
    block = raw[start : start + size]
    restarts = int.from_bytes(block[-4:], "little")
    end = len(block) - 4 * (restarts + 1)
    key = b""
    position = 0
    while position < end:
        shared, position = _varint(block, position)  # bytes in common with the key before
        fresh, position = _varint(block, position)
        length, position = _varint(block, position)
        key = key[:shared] + block[position : position + fresh]
        position += fresh
        yield key, block[position : position + length]
        position += length


def _varint(raw: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if position >= len(raw):
            raise ValueError("read_table: expected a number, got the end of the data")
        byte = raw[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7


def _fields(raw: bytes) -> dict[int, list[int | bytes]]:
    """Fields of a protocol buffer by number: varints as integers, everything else as bytes."""
    fields: dict[int, list[int | bytes]] = {}
    position = 0
    while position < len(raw):
        tag, position = _varint(raw, position)
        value: int | bytes
        if tag & 7 == 0:
            value, position = _varint(raw, position)
        elif tag & 7 == 2:
            length, position = _varint(raw, position)
            value, position = raw[position : position + length], position + length
        elif tag & 7 in (1, 5):
            length = 8 if tag & 7 == 1 else 4
            value, position = raw[position : position + length], position + length
        else:
            raise ValueError(f"read_bundle: expected a protocol buffer, got wire type {tag & 7}")
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def _number(fields: dict[int, list[int | bytes]], field: int) -> int:
    value = fields.get(field, [0])[-1]
    if not isinstance(value, int):
        raise ValueError(f"read_bundle: expected a number in field {field}, got {len(value)} bytes")
    return value


def _entry(raw: bytes) -> Entry:
    fields = _fields(raw)
    shape: list[int] = []
    for message in fields.get(2, []):
        dims = _fields(message)[2] if isinstance(message, bytes) and message else []
        shape += [_number(_fields(dim), 1) for dim in dims if isinstance(dim, bytes)]
    return Entry(
        dtype=_number(fields, 1),
        shape=tuple(shape),
        shard=_number(fields, 3),
        offset=_number(fields, 4),
        size=_number(fields, 5),
    )


def _tensor(name: str, entry: Entry, data: list[bytes]) -> np.ndarray:
    if entry.dtype != FLOAT32:
        raise NotImplementedError(
            f"read_bundle: expected {name} in float32 [type 1], got type {entry.dtype}"
        )
    raw = data[entry.shard][entry.offset : entry.offset + entry.size]
    expected = 4 * math.prod(entry.shape)
    if len(raw) != expected:
        raise ValueError(
            f"read_bundle: expected {expected} bytes of {name} [shape {list(entry.shape)}], "
            f"got {len(raw)}"
        )
    return np.frombuffer(raw, "<f4").reshape(entry.shape)
