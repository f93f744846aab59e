# SPDX-License-Identifier: Apache-2.0
"""The queue between generation and the writer thread: bounded in bytes, with a policy when full."""

from __future__ import annotations

import tempfile
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .labels import BroadcastLabels

POLICIES = ("block", "drop", "spill", "error")

Rows = Mapping[str, tuple[Tensor, BroadcastLabels]]

# Small pieces are handled together, up to so many bytes, and wait so many seconds for company.
_BATCH_BYTES = 1 << 20
_PATIENCE = 0.05


@dataclass
class Spilled:
    """Rows that wait on disk: where they are in the spill file."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class Spill:
    """A file that takes rows when memory is full and gives them back in order."""

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 closed by close()
        self._end = 0
        self._waiting = 0
        self._lock = threading.Lock()
        self.rows = 0

    def put(self, rows: Tensor) -> Spilled:
        """Append a contiguous CPU tensor."""
        content = rows.contiguous().view(torch.uint8).numpy().data.cast("B")
        with self._lock:
            self._file.seek(self._end)
            self._file.write(content)
            self._file.flush()
            place = Spilled(self._end, tuple(rows.shape), rows.dtype)
            self._end += len(content)
            self._waiting += 1
            self.rows += len(rows)
        return place

    def take(self, place: Spilled) -> Tensor:
        """Read a tensor back; the file is emptied once nothing waits in it."""
        size = int(np.prod(place.shape)) * place.dtype.itemsize
        content = torch.empty(size, dtype=torch.uint8)
        with self._lock:
            self._file.seek(place.offset)
            got = self._file.readinto(content.numpy().data)
            if got != size:
                raise OSError(f"store: expected {size} bytes in the spill file, got {got}")
            self._waiting -= 1
            if not self._waiting:
                self._file.truncate(0)
                self._end = 0
        return content.view(place.dtype).reshape(place.shape)

    def close(self) -> None:
        """Give the space back."""
        self._file.close()


class Channel:
    """First in, first out; rows count against `limit` bytes, everything else passes.

    Args:
        limit: bytes of rows that may wait. A single piece larger than that waits for an empty
            queue.
        policy: what happens to rows that find no room: "block" (wait), "drop" (throw away and
            count), "spill" (wait on disk), "error" (raise).
        spill: file for "spill".
        batch_bytes: rows that `get` hands out together, at most.
    """

    def __init__(
        self, limit: int, policy: str, spill: Spill | None, batch_bytes: int = _BATCH_BYTES
    ) -> None:
        self.limit, self.policy, self.spill = limit, policy, spill
        self.waiting_bytes = 0  # queued, and taken but not yet done
        self.peak_bytes = 0
        self._queued_bytes = 0
        self._held = 0
        self._urgent = False
        self._batch_bytes = min(batch_bytes, _BATCH_BYTES)
        self._enough = min(self._batch_bytes, limit // 4)
        self._items: deque[tuple[Any, int]] = deque()
        self._changed = threading.Condition()
        self._failure: BaseException | None = None

    def fail(self, error: BaseException) -> None:
        """Let every producer see why nobody takes anything any more."""
        with self._changed:
            self._failure = error
            self._items.clear()
            self.waiting_bytes = 0
            self._changed.notify_all()

    def put(self, item: Any, urgent: bool = True) -> None:
        """Add something that is not rows; what is not urgent may wait for more to come."""
        with self._changed:
            self._check()
            self._add(item, 0, urgent)

    def _add(self, item: Any, size: int, urgent: bool = False) -> None:
        first = not self._items
        self._items.append((item, size))
        self.waiting_bytes += size
        self._queued_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.waiting_bytes)
        self._urgent |= urgent
        # The thread is not woken for every small piece: that would cost more than the piece.
        if first or self._urgent or self._queued_bytes >= self._enough:
            self._changed.notify_all()

    def put_rows(self, rows: Rows, ready: Callable[[], None] | None = None) -> bool:
        """Add ("rows", (rows, ready)), or do with the rows what the policy says.

        Args:
            rows: by site.
            ready: to be called before the rows are looked at.

        Returns:
            Whether they were kept.

        Raises:
            RuntimeError: no room, with policy "error".
        """
        size = sum(tensor.nbytes for tensor, _ in rows.values())
        with self._changed:
            self._check()
            if not self._fits(size):
                if self.policy == "drop":
                    return False
                if self.policy == "error":
                    raise RuntimeError(
                        f"store: expected room for {size} bytes in the queue of {self.limit} "
                        f"[policy='error'], got {self.waiting_bytes} bytes waiting"
                    )
                if self.policy == "block":
                    self._urgent = True
                    self._changed.notify_all()
                    self._changed.wait_for(lambda: self._failure is not None or self._fits(size))
                    self._check()
            if self._fits(size) or self.spill is None:
                self._add(("rows", (rows, ready)), size)
                return True
        # Outside of the lock: the writer thread goes on while the disk is busy.
        if ready is not None:
            ready()
        placed = {site: (self.spill.put(tensor), labels) for site, (tensor, labels) in rows.items()}
        self.put(("rows", (placed, None)))
        return True

    def get(self) -> list[Any]:
        """Take some items, in order, waiting for them; their bytes count until `done`."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._items))
            self._changed.wait_for(
                lambda: self._urgent or self._queued_bytes >= self._enough, timeout=_PATIENCE
            )
            taken = []
            while self._items and self._held < self._batch_bytes:
                item, size = self._items.popleft()
                taken.append(item)
                self._held += size
            self._queued_bytes -= self._held
            self._urgent &= bool(self._items)
            return taken

    def done(self) -> None:
        """Say that the items taken are finished with."""
        with self._changed:
            self.waiting_bytes -= self._held
            self._held = 0
            self._changed.notify_all()

    def _fits(self, size: int) -> bool:
        return self.waiting_bytes == 0 or self.waiting_bytes + size <= self.limit

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure
