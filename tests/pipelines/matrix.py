# SPDX-License-Identifier: Apache-2.0
"""The contract matrix, families x checks, from the reports of a test run."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

_NODE = re.compile(
    r"pipelines/test_famil\w+\.py::(?:TestEveryFamily|TestMatrix)::test_(\w+)\[(\w+)\]$"
)
_MARKS = {"passed": "+", "skipped": ".", "xfailed": "x", "failed": "F", "error": "F"}


def results(stats: Mapping[str, Iterable[Any]]) -> dict[str, dict[str, str]]:
    """Return {check: {family: mark}} of `terminalreporter.stats`."""
    found: dict[str, dict[str, str]] = {}
    for outcome, mark in _MARKS.items():
        for report in stats.get(outcome, ()):
            node = _NODE.search(getattr(report, "nodeid", ""))
            if node is None:
                continue
            row = found.setdefault(node[1], {})
            # A failed check stays failed whatever else was reported of it.
            row[node[2]] = "F" if "F" in (row.get(node[2]), mark) else mark
    return found


def lines(stats: Mapping[str, Iterable[Any]]) -> list[str]:
    """Return the matrix as text; nothing where none of its checks ran."""
    found = results(stats)
    if not found:
        return []
    families = sorted({family for row in found.values() for family in row})
    width = max(len(check) for check in found)
    shown = [f"contract matrix: {len(families)} families x {len(found)} checks "
             "(+ holds, . nothing to check, F failed)"]  # fmt: skip
    shown += [f"{i:>3} {family}" for i, family in enumerate(families, 1)]
    shown.append(" " * width + "".join(f"{i:>3}" for i in range(1, len(families) + 1)))
    for check, row in sorted(found.items()):
        shown.append(check.ljust(width) + "".join(f"{row.get(f, '-'):>3}" for f in families))
    return shown
