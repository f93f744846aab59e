# SPDX-License-Identifier: Apache-2.0
"""Lines that tests leave for the end of the run, gathered from every test process."""

from __future__ import annotations

from collections import Counter
from typing import Any

LINES: list[str] = []
CASES: Counter[str] = Counter()  # what was tested -> how often


def pack() -> dict[str, Any]:
    """Return what this process has, as plain values."""
    return {"lines": LINES, "cases": dict(CASES)}


def add(packed: dict[str, Any] | None) -> None:
    """Take over what another process had."""
    if packed is not None:
        LINES.extend(packed["lines"])
        CASES.update(packed["cases"])


def lines() -> list[str]:
    """Return everything to be shown."""
    return [*LINES, *(f"{what} x {n} cases" for what, n in sorted(CASES.items()))]
