# SPDX-License-Identifier: Apache-2.0
"""Many small units written as one piece, while each stays complete or absent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .labels import BroadcastLabels
from .transaction import Transaction

Item = tuple[str, Any]


class UnitBatch:
    """Collects rows and ends of units, and gives them to the transaction together.

    Rows of complete units go as one piece for each site. If that fails, it is undone and repeated
    unit by unit, so that an error costs the unit in which it happens and those after it, no other.
    """

    def __init__(self, transaction: Transaction) -> None:
        self.transaction = transaction
        self._items: list[Item] = []
        self._inside = False  # the transaction holds rows of a unit that has not ended

    def add(self, kind: str, content: Any) -> None:
        """Collect ("rows", (rows, ready)) or ("end", cursor)."""
        if kind == "rows":
            rows, ready = content
            if ready is not None:
                ready()
            content = rows
        self._items.append((kind, content))

    def forget(self) -> None:
        """Say that the transaction was rolled back."""
        self._inside = False

    def flush(self) -> None:
        """Give everything collected to the transaction."""
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
            self.transaction.rollback()
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
            self.transaction.append(site, found)

    def _end(self, items: Sequence[Item]) -> None:
        ends = [content for kind, content in items if kind == "end"]
        if ends:
            self.transaction.end(next((c for c in reversed(ends) if c is not None), None))
            self._inside = False


def _after_end(items: Sequence[Item], first: bool) -> int:
    """Number of items up to the first or last end of a unit, that included; 0 without one.

    Without an end all items belong to the unit that is open: for `first` that is all of them.
    """
    ends = [place + 1 for place, (kind, _) in enumerate(items) if kind == "end"]
    if first:
        return ends[0] if ends else len(items)
    return ends[-1] if ends else 0
