# SPDX-License-Identifier: Apache-2.0
"""The demo from end to end: what a user waits for after `sidechain demo`."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from .cases import Row
from .machine import Machine

WHOLE = "whole"


def rows(
    machine: Machine, *, only: str = "", seconds: float = 0.0, quick: bool = False
) -> Iterator[list[Row]]:
    """Run the demo once, into a folder that is thrown away.

    Args:
        machine: where.
        only: unused, since the demo has no parts.
        seconds: unused, since a run takes minutes and is timed once.
        quick: the short demo, to see that everything runs.

    Yields:
        A row for each of its stages and one for the whole, imports and report included.

    Raises:
        ValueError: `only` is given.
    """
    if only:
        raise ValueError(f"bench: expected no part of demo, got {only!r}")
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        from sidechain.studies.demo import page
        from sidechain.studies.demo.run import run, settings

        found = run(Path(folder), settings(short=quick, device=machine.device))
        page.write(found, Path(folder) / "report.html")
        taken = {**found.seconds, WHOLE: time.perf_counter() - begun}
    yield [_row(stage, value) for stage, value in taken.items()]


def _row(stage: str, seconds: float) -> Row:
    row = Row(stage, "f32", "sidechain demo", "ours", 0, 0)
    row.median_us, row.method = round(1e6 * seconds, 1), "one run"
    return row
