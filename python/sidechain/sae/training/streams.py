# SPDX-License-Identifier: Apache-2.0
"""Streams of training rows: anything that yields tensors, in the order it yields them."""

from __future__ import annotations

import itertools
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..._device import send
from ..._errors import InputError
from ...store import Permutation, Statistics
from ...store.arrays import add_good
from ..config import Provenance
from ..initialise import mix
from ..normaliser import Normaliser
from .bad_rows import BadRows
from .fitting import fit
from .mesh import Mesh
from .rows import Item, Rows, as_rows, join, selected

#: Rows at the head of a stream that fit the normaliser and tell one stream from another.
CALIBRATION = 1 << 16
# Rows of a batch whose bytes count in the checksum of what was seen.
_SAMPLED = 16


class IterableSource:
    """Rows of anything that yields tensors, in the order it yields them.

    A run that continues passes over the rows it has seen and compares them with a checksum that
    the checkpoint keeps. In a mesh every process gets all rows and takes its slice.

    Args:
        items: a list or another iterable that can be gone through again, a function that returns a
            fresh iterator, an iterator, or a `torch.utils.data.DataLoader` (one that shuffles gets
            its random numbers from the seed and the epoch). An item: see `rows.as_rows`.
        name: for the provenance.
        epochs: times through the items.
        buffer: rows that are shuffled together; 0 = in the order they come.
        seed: of the shuffling.

    Raises:
        ValueError: several epochs of an iterator, which ends once.
    """

    def __init__(
        self,
        items: Iterable[Item] | Callable[[], Iterable[Item]],
        *,
        name: str = "iterable",
        epochs: int = 1,
        buffer: int = 0,
        seed: int = 0,
    ) -> None:
        if isinstance(items, Iterator) and epochs != 1:
            raise ValueError(
                f"IterableSource: expected epochs=1 with an iterator [it ends once], got {epochs}; "
                "give a function that returns a fresh one"
            )
        self._items, self.name = items, name
        self._epochs, self._buffer, self._seed = epochs, buffer, seed
        self._seen: list[Any] = []  # items at the head of an iterator
        self._first: _Head | None = None
        self.bad_rows = BadRows()
        self.checksum = 0
        self._expected: tuple[int, int] | None = None

    def expect(self, batches: int, checksum: int | None) -> None:
        """Note the checksum of the first batches, which a run that continues passes over."""
        self._expected = None if checksum is None else (batches, checksum)

    def widths(self) -> tuple[int, int]:
        """Return d_in and d_out of the first item."""
        return self._head.widths

    def targeted(self) -> bool:
        """Return whether the rows have a target."""
        return self._head.targeted

    def available(self, batch: int) -> int | None:
        """Return None: a stream does not say how long it is."""
        return None

    def normalisers(self, kind: str, *, centre: bool) -> tuple[Normaliser, Normaliser | None]:
        """Return normalisers fitted to the first rows."""
        head = self._head
        kind = kind if head.labelled or kind == "none" else "global"
        own, *other = (fit(known, kind, centre=centre) for known in head.statistics)
        return own, other[0] if other else None

    def batches(self, batch: int, start: int, mesh: Mesh, device: torch.device) -> Iterator[Rows]:
        """Yield rows from batch number `start` on; `checksum` is that of all rows before.

        Raises:
            InputError: a bad row, or items that differ in what they have.
        """
        first, last = mesh.rows(batch)
        self.bad_rows.skipped = self.checksum = 0
        for number, rows in enumerate(regroup(self._shuffled(), batch)):
            self.checksum = _sampled(rows, self.checksum)
            if self._expected is not None and number + 1 == self._expected[0]:
                self._compare()
            if number >= start:
                own = selected(rows, slice(first, last))
                yield Rows(*(None if t is None else send(t, device) for t in own))  # type: ignore[arg-type]

    def _compare(self) -> None:
        if self._expected is not None and self.checksum != self._expected[1]:
            raise InputError(
                f"IterableSource: expected the rows of the run up to batch {self._expected[0]}, "
                "got others: a stream that comes in another order each time cannot continue a run"
            )

    def identity(self) -> dict[str, Any]:
        """Return its name and the checksum of its head."""
        shuffled = {"buffer": self._buffer, "seed": self._seed} if self._buffer else {}
        return {"iterable": self.name, "rows": self._head.checksum, **shuffled}

    def provenance(self) -> Provenance:
        """Return its name."""
        return Provenance(source=self.name)

    # -- reading --------------------------------------------------------------------------------

    @property
    def _head(self) -> _Head:
        if self._first is None:
            once = isinstance(self._items, Iterator)
            self._first = head = _Head()
            for number, item in enumerate(self._fresh(0)):
                if once:
                    self._seen.append(item)
                head.add(as_rows(item, number), number)
                if head.count >= CALIBRATION:
                    break
            if not head.count:
                raise ValueError("IterableSource: expected at least one item with rows, got none")
        return self._first

    def _fresh(self, epoch: int) -> Iterator[Item]:
        """Return the items of an epoch from the first one on."""
        if isinstance(self._items, Iterator):
            seen, self._seen = self._seen, []
            return itertools.chain(seen, self._items)
        if isinstance(self._items, torch.utils.data.DataLoader):
            return _seeded(self._items, mix(self._seed, 4, epoch))
        return iter(self._items() if callable(self._items) else self._items)

    def _shuffled(self) -> Iterator[Rows]:
        if not self._buffer:
            yield from self._good()
            return
        for number, rows in enumerate(_filled(self._good(), self._buffer)):
            order = Permutation(len(rows.x), self._seed, number)
            yield selected(rows, torch.from_numpy(order(torch.arange(len(rows.x)).numpy())))

    def _good(self) -> Iterator[Rows]:
        """Yield the items as rows, bad rows refused or left out."""
        head, passed = self._head, 0
        again = _Head()
        same = True
        for epoch in range(self._epochs):
            for number, item in enumerate(self._fresh(epoch)):
                rows = as_rows(item, number)
                head.check(rows, number)
                if same and epoch == 0 and again.count < head.count:
                    again.add(rows, number, only_checksum=True)
                    same = again.checksum == head.checksums[number]
                    if not same:
                        _warn_changed()
                place = f"row {{row}} of item {number} (row {passed} of the stream on)"
                passed += len(rows.x)
                yield self.bad_rows.without(rows, place)


class _Head:
    """What the first rows of a stream say: widths, statistics, checksum."""

    def __init__(self) -> None:
        self.count = self.checksum = 0
        self.checksums: list[int] = []  # after each item
        self.widths = (0, 0)
        self.labelled = self.targeted = False
        self.statistics: list[Statistics] = []

    def add(self, rows: Rows, number: int, *, only_checksum: bool = False) -> None:
        """Add the rows of an item."""
        if not self.count:
            parts = [rows.x] if rows.target is None else [rows.x, rows.target]
            self.widths = (parts[0].shape[1], parts[-1].shape[1])
            self.labelled, self.targeted = rows.step is not None, rows.target is not None
            self.statistics = [Statistics(part.shape[1]) for part in parts]
        self.check(rows, number)
        self.count += len(rows.x)
        for part in rows:
            if part is not None:
                self.checksum = _bytes(part, self.checksum)
        self.checksums.append(self.checksum)
        if only_checksum:
            return
        add_good(self.statistics[0], rows.x, rows.step)
        if rows.target is not None:
            add_good(self.statistics[1], rows.target, rows.step)

    def check(self, rows: Rows, number: int) -> None:
        """Refuse rows that have other parts or widths than the first ones.

        Raises:
            InputError: they have.
        """
        for name, now, first in (
            ("steps", rows.step is not None, self.labelled),
            ("a target", rows.target is not None, self.targeted),
        ):
            if now != first:
                wanted, got = (name, "none") if first else (f"no {name.split()[-1]}", "some")
                raise InputError(
                    f"IterableSource: expected {wanted} in item {number} [as in item 0], got {got}"
                )
        found = (rows.x.shape[1], (rows.x if rows.target is None else rows.target).shape[1])
        if found != self.widths:
            raise InputError(
                f"IterableSource: expected widths {self.widths[0]} and {self.widths[1]} in item "
                f"{number} [as in item 0], got {found[0]} and {found[1]}"
            )


def regroup(items: Iterable[Rows], batch: int) -> Iterator[Rows]:
    """Yield batches of exactly `batch` rows; what fills no batch at the end is lost."""
    for rows in _filled(items, batch):
        if len(rows.x) == batch:
            yield rows


def _filled(items: Iterable[Rows], size: int) -> Iterator[Rows]:
    """Yield groups of `size` rows, and the rest."""
    held: list[Rows] = []
    count = 0
    for item in items:
        held.append(item)
        count += len(item.x)
        if count < size:
            continue
        whole = join(held)
        for start in range(0, count - size + 1, size):
            yield selected(whole, slice(start, start + size))
        count %= size
        held = [selected(whole, slice(len(whole.x) - count, None))] if count else []
    if count:
        yield join(held)


def _seeded(loader: Any, seed: int) -> Iterator[Item]:
    """Go through a DataLoader whose sampler and workers draw from this seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        items = iter(loader)
        first = next(items, None)
    if first is not None:
        yield first
        yield from items


def _sampled(rows: Rows, checksum: int) -> int:
    """Add some rows of a batch to a checksum: all of them would cost a part of a step."""
    chosen = slice(None, None, max(1, len(rows.x) // _SAMPLED))
    for part in rows:
        if part is not None:
            checksum = _bytes(part[chosen], checksum)
    return checksum


def _bytes(t: Tensor, checksum: int) -> int:
    data = t.detach().cpu().contiguous().view(torch.uint8).numpy()
    return zlib.crc32(data.data, checksum)


def _warn_changed() -> None:
    warnings.warn(
        "IterableSource: the first rows are others than when the stream was opened: a run that is "
        "cut off could not go on bit for bit, and would be refused",
        RuntimeWarning,
        stacklevel=2,
    )
