# SPDX-License-Identifier: Apache-2.0
"""Rows that are not finite: found before a step sees them, refused or left out and counted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..._errors import InputError
from ...store.finite import bad_rows
from .rows import Rows, selected

__all__ = ["BadRows", "checked", "find"]


@dataclass
class BadRows:
    """What a source does with bad rows, and how many it has met.

    Attributes:
        policy: "error" | "skip".
        skipped: rows left out since the start of the run.
    """

    policy: str = "error"
    skipped: int = 0

    def without(self, rows: Rows, place: str) -> Rows:
        """Return the good rows, or raise.

        Args:
            rows: as a source reads them.
            place: what they are, for the message; {row} stands for the number of a row.

        Raises:
            InputError: there is a bad one and the policy is "error".
        """
        bad = find(rows)
        if not len(bad):
            return rows
        if self.policy == "error":
            raise InputError(
                "expected finite rows [and finite squares], got "
                + place.format(row=int(bad[0]))
                + (f" and {len(bad) - 1} others" if len(bad) > 1 else "")
            )
        self.skipped += len(bad)
        keep = torch.ones(len(rows.x), dtype=torch.bool, device=rows.x.device)
        keep[bad] = False
        return selected(rows, keep)


def find(rows: Rows) -> Tensor:
    """Return the numbers of rows that are bad, or whose target is."""
    bad = bad_rows(rows.x)
    if rows.target is None:
        return bad
    return torch.cat([bad, bad_rows(rows.target)]).unique()


def checked(batches: Iterator[Rows]) -> Iterator[Rows]:
    """Yield batches of a source that does not look at its rows itself, bad ones refused.

    On a GPU the next batch is looked at before the step before it is launched, so that no step
    waits for the device but that of the batch before the last one.

    Raises:
        InputError: a bad row, in the place of its batch.
    """
    waiting: tuple[Rows, _Look] | None = None
    for rows in batches:
        now = (rows, _Look(rows))
        if waiting is not None:
            waiting[1].finish()
            yield waiting[0]
        waiting = now
    if waiting is not None:
        waiting[1].finish()
        yield waiting[0]


class _Look:
    """A look at rows on a device whose answer is on its way to the host."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        sums = [torch.linalg.vector_norm(t.detach().float(), dim=-1) for t in _floats(rows)]
        good = torch.stack([norm.isfinite().all() for norm in sums]).all()
        on_gpu = good.device.type == "cuda"
        self._good = torch.empty((), dtype=torch.bool, pin_memory=on_gpu)
        self._good.copy_(good, non_blocking=True)
        self._copied: Any = (
            torch.cuda.current_stream(good.device).record_event() if on_gpu else None
        )

    def finish(self) -> None:
        """Wait for the answer; raise where a row is bad."""
        if self._copied is not None:
            self._copied.synchronize()
        if not bool(self._good):
            BadRows().without(self._rows, "row {row} of the batch")


def _floats(rows: Rows) -> list[Tensor]:
    return [rows.x] if rows.target is None else [rows.x, rows.target]
