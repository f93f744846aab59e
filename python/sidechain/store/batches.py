# SPDX-License-Identifier: Apache-2.0
"""Batches of a store: shuffled without a table, prefetched, resumable at any position."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._device import send
from .._errors import InputError
from .finite import bad_rows
from .labels import Labels
from .options import BatchOptions
from .protocol import RowReader
from .shard import decode
from .shuffle import Permutation

_BLOCK = 64
_WINDOW = 64
# Draws of another row in the place of a bad one before all are taken to be bad.
_DRAWS = 32


@dataclass(frozen=True)
class Batch:
    """Rows of a store.

    Attributes:
        x: [B, C] on the device asked for.
        rows: their numbers in the store [B] int64 on the CPU.
        labels: step, branch, prompt and token of each on the CPU, or None if not asked for.
        step: scheduler step of each [B] int64, where `x` is; None without labels.
        skipped: number of bad rows of which others were read in their place.
        target: the same rows at the target site [B, C'], or None if there is none.
    """

    x: Tensor
    rows: Tensor
    labels: Labels | None
    target: Tensor | None = None
    step: Tensor | None = None
    skipped: int = 0


class Batches:
    """An iterator over the batches of a store; made by `ActivationStore.batches`.

    Args:
        store: what to read.
        options: see `BatchOptions`.
        device: where `x` should be. On CUDA rows pass through pinned buffers on a stream of their
            own.
        target: another site with the same rows, for a transcoder.
        part: (first, last) keeps rows [first, last) of every batch: the share of one of several
            processes that go through the same batches.

    `state_dict` holds the position of the consumer, prefetched batches not counted. After
    `load_state_dict` the batches that follow are the same as without the interruption.

    Raises:
        ValueError: options that do not fit; a store without a full batch; a state of another store.
    """

    def __init__(
        self,
        store: RowReader,
        options: BatchOptions,
        *,
        device: str | torch.device = "cpu",
        target: RowReader | None = None,
        part: tuple[int, int] | None = None,
    ) -> None:
        self.store, self.target, self.part, self.options = store, target, part, options
        self._check()
        self.seed = options.seed
        self.epoch = 0
        self.position = 0
        place = torch.device(device)
        self._loader = _Loader(store, options, place)
        self._targets = None
        if target is not None:
            self._targets = _Loader(target, replace(options, labels=False), place)
        self._permutation: tuple[int, Permutation] | None = None

    def __len__(self) -> int:
        """Batches in one epoch."""
        full, rest = divmod(len(self.store), self.options.batch_size)
        return full + (1 if rest and not self.options.drop_last else 0)

    def state_dict(self) -> dict[str, Any]:
        """Position of the consumer, with the order and the rows it belongs to."""
        return {
            "seed": self.seed,
            "epoch": self.epoch,
            "position": self.position,
            "batch_size": self.options.batch_size,
            "shuffle": self.options.shuffle,
            "fingerprint": self.store.fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the state of another one; to be called before iterating.

        Raises:
            ValueError: the store, its filters or the shuffling are not the same.
        """
        mine = self.state_dict()
        for key in ("shuffle", "fingerprint"):
            if state[key] != mine[key]:
                raise ValueError(
                    f"batches: expected a state with {key} {mine[key]} [of this store], got "
                    f"{state[key]}"
                )
        if self.options.shuffle == "blocks" and state["batch_size"] != self.options.batch_size:
            raise ValueError(
                f"batches: expected batch_size {self.options.batch_size} [shuffle='blocks'], got "
                f"{state['batch_size']}"
            )
        self.seed, self.epoch, self.position = state["seed"], state["epoch"], state["position"]

    def __iter__(self) -> Iterator[Batch]:
        """Iterate from the current position."""
        plan = self._plan()
        source = (
            _ahead(plan, self._load, self.options.prefetch)
            if self.options.prefetch
            else ((place, self._load(place, rows)) for place, rows in plan)
        )
        for (epoch, position), (loaded, aimed, skipped) in source:
            self.epoch, self.position = epoch, position
            rows = torch.from_numpy(loaded.rows)
            labels, step = (loaded.labels, loaded.step) if self.options.labels else (None, None)
            x = self._loader.finish(loaded)
            target = None
            if self._targets is not None and aimed is not None:
                target = self._targets.finish(aimed)
            del loaded, aimed  # their memory is reused once the consumer has released it
            yield Batch(x, rows, labels, target, step, skipped)
            del x, target, step

    def _load(self, place: _Place, rows: NDArray[np.int64]) -> _Found:
        """Read the rows of a batch that ends at a place, others in the place of bad ones."""
        epoch, stop = place
        positions = np.arange(stop - len(rows), stop, dtype=np.int64)
        if self.part is not None:
            rows, positions = rows[slice(*self.part)], positions[slice(*self.part)]
        skipped = 0
        for draw in range(_DRAWS):
            loaded = self._loader.load(rows)
            aimed = None if self._targets is None else self._targets.load(rows)
            bad = loaded.bad if aimed is None else np.union1d(loaded.bad, aimed.bad)
            if not len(bad):
                return loaded, aimed, skipped
            if self.options.on_bad_rows == "error":
                break
            skipped += len(bad)
            again = Permutation(len(self.store), self.seed + draw + 1, epoch)
            rows = rows.copy()
            rows[bad] = again(positions[bad])
        raise InputError(
            f"batches: expected finite rows [and finite squares], got row {rows[bad[0]]}"
            + (", and no good one in its place" if self.options.on_bad_rows == "skip" else "")
        )

    def order(self, epoch: int, start: int, stop: int) -> NDArray[np.int64]:
        """Row numbers at positions [start, stop) of an epoch."""
        positions = np.arange(start, stop, dtype=np.int64)
        if self.options.shuffle == "off":
            return positions
        if self.options.shuffle == "blocks":
            return self._block_order(epoch, positions)
        return self._permuted(len(self.store), epoch)(positions)

    def _permuted(self, size: int, epoch: int) -> Permutation:
        if self._permutation is None or self._permutation[0] != epoch:
            self._permutation = (epoch, Permutation(size, self.seed, epoch))
        return self._permutation[1]

    def _block_order(self, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        total = len(self.store)
        blocks = total // _BLOCK  # rows that fill no block stay at the end
        window = _BLOCK * _WINDOW * -(-self.options.batch_size // _BLOCK)
        shuffled = positions.copy()
        for number in np.unique(positions // window):
            first = number * window
            size = min(window, total - first)
            here = np.flatnonzero(positions // window == number)
            inner = Permutation(int(size), self.seed + int(number) + 1, epoch)
            shuffled[here] = first + inner(positions[here] - first)
        block, within = shuffled // _BLOCK, shuffled % _BLOCK
        if not blocks:
            return shuffled
        inside = block < blocks
        moved = self._permuted(blocks, epoch)(np.where(inside, block, 0))
        return np.where(inside, moved * _BLOCK + within, shuffled)

    def _plan(self) -> Iterator[tuple[tuple[int, int], NDArray[np.int64]]]:
        """Yield the state after each batch, and the rows of the batch."""
        total, size = len(self.store), self.options.batch_size
        epoch, position = self.epoch, self.position
        while self.options.epochs is None or epoch < self.options.epochs:
            last = total - size if self.options.drop_last else total - 1
            if position > last:
                epoch, position = epoch + 1, 0
                continue
            stop = min(position + size, total)
            rows = self.order(epoch, position, stop)
            position = stop
            yield (epoch, position), rows

    def _check(self) -> None:
        size, whole = self.options.batch_size, self.options.drop_last
        if self.target is not None and len(self.target) != len(self.store):
            raise ValueError(
                f"batches: expected {len(self.store)} rows in the target [as in the store], got "
                f"{len(self.target)}"
            )
        if self.part is not None and not 0 <= self.part[0] < self.part[1] <= size:
            raise ValueError(
                f"batches: expected 0 <= first < last <= {size} in part, got {self.part}"
            )
        if self.part is not None and not whole:
            raise NotImplementedError("batches: expected drop_last with part, got drop_last=False")
        if size < 1 or len(self.store) < (size if whole else 1):
            raise ValueError(
                f"batches: expected 1 <= batch_size <= {len(self.store)} [rows of the store], got "
                f"{size}"
            )


@dataclass
class _Loaded:
    """A batch that is being loaded: stored bytes, labels, and the event at which they are there."""

    stored: Tensor
    rows: NDArray[np.int64]
    labels: Labels | None
    step: Tensor | None
    bad: NDArray[np.int64]
    event: Any = None


class _Loader:
    """Turns row numbers into batches: `load` in the prefetch thread, `finish` in the consumer's."""

    def __init__(self, store: RowReader, options: BatchOptions, device: torch.device) -> None:
        self.store, self.device, self.dtype = store, device, options.dtype
        self.normalise, self.labels = options.normalise, options.labels
        self.looks = options.on_bad_rows is not None
        self.pool: list[tuple[NDArray[np.uint8], weakref.ref[Any]]] = []
        self.pinned: list[tuple[Tensor, Any]] = []
        self.stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self.normalise == "step":
            mean, scale = store.statistics.per_step()
            self.mean, self.inverse = mean.to(device), (1.0 / scale).to(device)
        elif self.normalise == "global":
            total = store.statistics.total()
            self.mean = total.mean.float().to(device)
            self.inverse = torch.tensor(1.0 / total.scale, device=device)

    def load(self, rows: NDArray[np.int64]) -> _Loaded:
        """Read rows and start to copy them to the device."""
        labels = None
        if self.labels or self.normalise == "step":
            labels = self.store.labels(rows)
        if self.stream is None:
            buffer = self._buffer(len(rows))
            self.store.gather(rows, buffer)
            host = torch.from_numpy(buffer)
            stored = send(host, self.device)
            return _Loaded(stored, rows, labels, self._steps(labels), self._bad(host))
        return self._to_cuda(rows, labels)

    def _bad(self, stored: Tensor) -> NDArray[np.int64]:
        """Return the bad ones among rows on the host, by their place in the batch."""
        if not self.looks:
            return np.empty(0, np.int64)
        return bad_rows(decode(stored, self.store.dtype, self.store.width)).numpy()

    def _steps(self, labels: Labels | None) -> Tensor | None:
        return None if labels is None else send(labels.step, self.device)

    def _buffer(self, count: int) -> NDArray[np.uint8]:
        """Return memory that no tensor uses; new pages would cost more than the copy itself."""
        shape = (count, self.store.row_bytes)
        pool = self.pool
        # A tensor keeps the array it was made of alive, so a dead view is free memory.
        place = next((i for i, (b, v) in enumerate(pool) if b.shape == shape and v() is None), None)
        buffer = np.empty(shape, np.uint8) if place is None else pool.pop(place)[0]
        view = buffer[:]
        self.pool = [*pool[-7:], (buffer, weakref.ref(view))]
        return view

    def _to_cuda(self, rows: NDArray[np.int64], labels: Labels | None) -> _Loaded:
        shape = (len(rows), self.store.row_bytes)
        while len(self.pinned) < 2:
            self.pinned.append((torch.empty(shape, dtype=torch.uint8, pin_memory=True), None))
        buffer, event = self.pinned.pop(0)
        if event is not None:
            event.synchronize()  # its last copy has left it
        if buffer.shape != shape:
            buffer = torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        self.store.gather(rows, buffer.numpy())
        bad = self._bad(buffer)
        with torch.cuda.stream(self.stream):
            stored = buffer.to(self.device, non_blocking=True)
            step = self._steps(labels)
            event = torch.cuda.Event()
            event.record(self.stream)
        self.pinned.append((buffer, event))
        return _Loaded(stored, rows, labels, step, bad, event)

    def finish(self, loaded: _Loaded) -> Tensor:
        """Decode and normalise on the device, in the stream of the caller."""
        if loaded.event is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(loaded.event)
            for sent in (loaded.stored, loaded.step):
                if sent is not None:
                    sent.record_stream(current)
        x = decode(loaded.stored, self.store.dtype, self.store.width)
        if self.normalise == "global":
            x = (x.float() - self.mean) * self.inverse
        elif self.normalise == "step" and loaded.step is not None:
            x = (x.float() - self.mean[loaded.step]) * self.inverse[loaded.step][:, None]
        return x if self.dtype is None else x.to(self.dtype)


_Place = tuple[int, int]
_Found = tuple[_Loaded, _Loaded | None, int]


def _ahead(
    plan: Iterator[tuple[_Place, NDArray[np.int64]]],
    load: Callable[[_Place, NDArray[np.int64]], _Found],
    depth: int,
) -> Iterator[tuple[_Place, _Found]]:
    """Load in a thread, at most `depth` batches ahead; ends with the consumer."""
    ready: queue.Queue[Any] = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def offer(item: Any) -> bool:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for place, rows in plan:
                if not offer((place, load(place, rows))):
                    return
            offer(None)
        except BaseException as error:
            offer(error)

    thread = threading.Thread(target=work, name="sidechain-prefetch", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
            del item
    finally:
        stop.set()
        thread.join()
