# SPDX-License-Identifier: Apache-2.0
"""Rows of arrays in memory or mapped from files, read by number as those of a store are."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .array_part import DTYPES, as_part, checked_steps
from .finite import bad_rows
from .labels import Labels
from .protocol import RowReader
from .row_index import gather_rows
from .shard import decode
from .shuffle import Permutation
from .statistics import Statistics

#: Rows that the statistics look at; of more, as many are looked at, spread evenly.
STATISTICS_ROWS = 1 << 18
#: Bytes that a checksum reads; of more, samples of 1 MiB, spread evenly.
CHECKSUM_BYTES = 4 << 30
_BLOCK = 4 << 20
_SAMPLE = 1 << 20


class BadFound(NamedTuple):
    """Rows that cannot be trained on: how many, and the number of the first one (-1 = none)."""

    number: int
    first: int


class ArrayRows:
    """Rows of arrays, one array after the other.

    Nothing is copied: rows are read when they are asked for, whatever the order of the array in
    memory, so that a memory-mapped file may be larger than the memory.

    Args:
        arrays: [..., d] of float16, bfloat16, float32 or float64, a NumPy array, memory map or CPU
            tensor, or several of one width; rows of float64 are read as float32, and so are rows of
            arrays of different dtypes.
        steps: scheduler step of each row [N], whole numbers; None = not known.
        name: what they are, for messages and provenance.

    Attributes:
        width, dtype: of a row as it is read.
        has_steps: whether `steps` were given.

    Raises:
        TypeError: no arrays, or elements that are no floating-point numbers.
        ValueError: no rows, widths that differ, or steps that do not fit.
    """

    def __init__(
        self, arrays: Any | Sequence[Any], *, steps: Any = None, name: str = "array"
    ) -> None:
        given = list(arrays) if isinstance(arrays, list | tuple) else [arrays]
        self.name = name
        parts = [as_part(a, f"{name} {number}") for number, a in enumerate(given)]
        parts = [part for part in parts if len(part)]
        if not parts:
            raise ValueError(f"rows: expected at least one row in {name}, got none")
        widths = sorted({part.values.shape[-1] for part in parts})
        if len(widths) > 1 or not widths[0]:
            raise ValueError(f"rows: expected arrays of one width in {name}, got {widths}")
        self.width = widths[0]
        kinds = {part.dtype for part in parts}
        self.dtype = DTYPES[kinds.pop()] if len(kinds) == 1 else torch.float32
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts])
        self._starts = self._ends - [len(part) for part in parts]
        self._steps = checked_steps(steps, len(self), name)
        self.has_steps = steps is not None

    def __len__(self) -> int:
        """Rows of all arrays."""
        return int(self._ends[-1])

    @property
    def row_bytes(self) -> int:
        """Bytes of a row as it is read."""
        return self.width * self.dtype.itemsize

    def gather(self, rows: NDArray[Any], out: NDArray[Any]) -> None:
        """Copy rows [n, row_bytes] by number.

        Raises:
            IndexError: a number outside [0, len).
        """
        _check_numbers(rows, len(self))
        part = np.searchsorted(self._ends, rows, side="right")
        place = rows - self._starts[part]
        if self._plain is not None:
            gather_rows(self._plain, part, place, out)
            return
        for number in np.unique(part):
            here = np.flatnonzero(part == number)
            found = self._parts[int(number)].take(place[here])
            out[here] = np.ascontiguousarray(self._converted(found)).view(np.uint8)

    @cached_property
    def _plain(self) -> list[NDArray[np.uint8]] | None:
        """The arrays as bytes, where all have their rows one after the other as they are read."""
        found = []
        for part in self._parts:
            if part.dtype == "float64" or DTYPES[part.dtype] != self.dtype:
                return None
            if not part.values.flags.c_contiguous:
                return None
            found.append(part.values.view(np.uint8).reshape(len(part), -1))
        return found

    def _converted(self, values: NDArray[Any]) -> NDArray[Any]:
        if values.dtype == np.uint16 and self.dtype == torch.float32:  # bfloat16 among others
            return (values.astype(np.uint32) << 16).view(np.float32)
        if self.dtype == torch.float32:
            with np.errstate(over="ignore"):  # becomes infinite, and a bad row
                return values.astype(np.float32, copy=False)
        return values

    def labels(self, rows: Any) -> Labels:
        """Labels of rows by number: step (0 where not known), token = number; no prompt.

        Raises:
            IndexError: a number outside [0, len).
        """
        numbers = np.asarray(rows, dtype=np.int64)
        _check_numbers(numbers, len(self))
        zero = torch.zeros(len(numbers), dtype=torch.int64)
        step = zero if self._steps is None else torch.from_numpy(self._steps[numbers])
        return Labels(step, zero.clone(), torch.full_like(zero, -1), torch.from_numpy(numbers))

    @cached_property
    def statistics(self) -> Statistics:
        """Statistics of the good rows: of all, or of 2^18 of them spread evenly."""
        return statistics_of(self)

    @cached_property
    def fingerprint(self) -> int:
        """CRC-32 of shapes, steps and bytes (of more than 4 GiB: of 4,096 samples of 1 MiB)."""
        return self._scan[0]

    @cached_property
    def bad(self) -> BadFound:
        """Bad rows among those that the fingerprint reads."""
        return self._scan[1]

    @cached_property
    def _scan(self) -> tuple[int, BadFound]:
        facts = [(part.dtype, (len(part), self.width)) for part in self._parts]
        checksum = zlib.crc32(repr(facts).encode())
        if self._steps is not None:
            checksum = zlib.crc32(self._steps.data, checksum)
        count, first = 0, -1
        for start, block in self._blocks():
            checksum = zlib.crc32(np.ascontiguousarray(block).view(np.uint8).data, checksum)
            found = np.array(self._converted(block), order="C")  # torch warns of read-only memory
            rows = torch.from_numpy(found.view(np.uint8)).view(self.dtype)
            bad = bad_rows(rows)
            if len(bad):
                first = start + int(bad[0]) if first < 0 else first
                count += len(bad)
        return checksum, BadFound(count, first)

    def _blocks(self) -> Iterator[tuple[int, NDArray[Any]]]:
        """Yield the rows in blocks with the number of the first one; of very many, samples."""
        total = len(self) * self.row_bytes
        start = 0
        for part in self._parts:
            rows = len(part)
            if total <= CHECKSUM_BYTES:
                size = max(1, _BLOCK // self.row_bytes)
                firsts: Any = range(0, rows, size)
            else:
                size = max(1, _SAMPLE // self.row_bytes)
                share = rows * self.row_bytes / total
                wanted = max(1, round(share * (CHECKSUM_BYTES // _SAMPLE)))
                firsts = np.unique(np.linspace(0, max(0, rows - size), wanted).astype(int)).tolist()
            for first in firsts:
                yield start + first, part.between(first, min(first + size, rows))
            start += rows


def _check_numbers(rows: NDArray[Any], count: int) -> None:
    if rows.size and not 0 <= rows.min() <= rows.max() < count:
        raise IndexError(
            f"rows: expected rows within [0, {count}), got {rows.min()} to {rows.max()}"
        )


class PartRows:
    """A part of the rows of a reader, drawn by a seed without a table.

    Args:
        reader: all rows.
        first: number of the first one in the drawn order.
        count: how many.
        seed: of the order.
    """

    def __init__(self, reader: RowReader, first: int, count: int, seed: int) -> None:
        self.reader, self._first, self._count, self._seed = reader, first, count, seed
        self._order = Permutation(len(reader), seed)
        self.width, self.dtype = reader.width, reader.dtype
        self.name = getattr(reader, "name", getattr(reader, "site", "rows"))
        self.has_steps = bool(getattr(reader, "has_steps", True))

    def __len__(self) -> int:
        """Rows of the part."""
        return self._count

    @property
    def row_bytes(self) -> int:
        """Bytes of a row as it is read."""
        return self.reader.row_bytes

    def numbers(self, rows: Any) -> NDArray[np.int64]:
        """Return the numbers in the whole of rows by number in the part.

        Raises:
            IndexError: a number outside [0, len).
        """
        numbers = np.asarray(rows, dtype=np.int64)
        _check_numbers(numbers, self._count)  # those beyond belong to another part
        return self._order(numbers + self._first)

    def gather(self, rows: NDArray[Any], out: NDArray[Any]) -> None:
        """Copy rows [n, row_bytes] by number."""
        self.reader.gather(self.numbers(rows), out)

    def labels(self, rows: Any) -> Labels:
        """Labels of rows by number."""
        return self.reader.labels(self.numbers(rows))

    @cached_property
    def statistics(self) -> Statistics:
        """Statistics of the good rows of the part; see `ArrayRows.statistics`."""
        return statistics_of(self)

    @property
    def fingerprint(self) -> int:
        """A number that changes with the rows."""
        facts = (self.reader.fingerprint, self._first, self._count, self._seed)
        return zlib.crc32(repr(facts).encode())


def split(reader: RowReader, share: float, *, seed: int = 0) -> tuple[PartRows, PartRows]:
    """Split rows into those to train on and a share that is held out, drawn by a seed.

    Args:
        reader: all rows.
        share: of the rows that are held out, in (0, 1).
        seed: of the draw.

    Returns:
        Rows to train on, and rows that are held out; none is in both.

    Raises:
        ValueError: a share that leaves one of them empty.
    """
    usable = isinstance(share, int | float) and 0 < share < 1
    held = round(share * len(reader)) if usable else 0
    if not 0 < held < len(reader):
        raise ValueError(
            f"split: expected a share that leaves rows on both sides of {len(reader)}, got {share}"
        )
    rest = len(reader) - held
    return PartRows(reader, 0, rest, seed), PartRows(reader, rest, held, seed)


def statistics_of(reader: RowReader) -> Statistics:
    """Return statistics by step of the good rows of a reader, of at most 2^18 spread evenly."""
    total = len(reader)
    if total <= STATISTICS_ROWS:
        numbers = np.arange(total)
    else:
        numbers = np.linspace(0, total - 1, STATISTICS_ROWS).astype(np.int64)
    statistics = Statistics(reader.width)
    for chosen in np.array_split(numbers, -(-len(numbers) // 8192)):
        stored = np.empty((len(chosen), reader.row_bytes), np.uint8)
        reader.gather(chosen, stored)
        x = decode(torch.from_numpy(stored), reader.dtype, reader.width)
        add_good(statistics, x, reader.labels(chosen).step)
    return statistics


def add_good(statistics: Statistics, x: Tensor, step: Tensor | None) -> None:
    """Add the good ones of rows [n, d] with steps [n] (None = 0) to statistics."""
    x = x.detach().cpu()
    step = torch.zeros(len(x), dtype=torch.int64) if step is None else step.cpu()
    bad = bad_rows(x)
    if len(bad):
        keep = torch.ones(len(x), dtype=torch.bool)
        keep[bad] = False
        x, step = x[keep], step[keep]
    for number in step.unique().tolist():
        chosen = step == number
        statistics.at((number, 0)).add(x if bool(chosen.all()) else x[chosen])
