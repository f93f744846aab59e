# SPDX-License-Identifier: Apache-2.0
"""The write queue between generation and the writer thread, bounded in bytes."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from .labels import BroadcastLabels

Rows = Mapping[str, tuple[Tensor, BroadcastLabels]]

# Small pieces are taken together: at most this many bytes, after waiting this many seconds.
_BATCH_BYTES = 1 << 20
_PATIENCE = 0.05


class WriteQueue:
    """First in, first out; rows count against `limit` bytes, everything else passes.

    Args:
        limit: bytes of rows that may wait. A single piece larger than that waits for an empty
            queue.
        batch_bytes: rows that `get` hands out together, at most.
    """

    def __init__(self, limit: int, batch_bytes: int = _BATCH_BYTES) -> None:
        self.limit = limit
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
        """Raise an error in every producer that waits now or puts something later."""
        with self._changed:
            self._failure = error
            self._items.clear()
            self.waiting_bytes = 0
            self._changed.notify_all()

    def put(self, item: Any, urgent: bool = True) -> None:
        """Add something other than rows; unless it is urgent, it may wait until more has come."""
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

    def put_rows(self, rows: Rows, ready: Callable[[], None] | None = None) -> None:
        """Add ("rows", (rows, ready)); waits for room.

        Args:
            rows: by site.
            ready: to be called before the rows are looked at.
        """
        size = sum(tensor.nbytes for tensor, _ in rows.values())
        with self._changed:
            self._check()
            if not self._fits(size):
                self._urgent = True
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._failure is not None or self._fits(size))
                self._check()
            self._add(("rows", (rows, ready)), size)

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
        """Release the bytes of the items that were taken."""
        with self._changed:
            self.waiting_bytes -= self._held
            self._held = 0
            self._changed.notify_all()

    def _fits(self, size: int) -> bool:
        return self.waiting_bytes == 0 or self.waiting_bytes + size <= self.limit

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure
