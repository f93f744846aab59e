# SPDX-License-Identifier: Apache-2.0
"""What the files in bench/results hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Run = dict[str, Any]  # as `sidechain.bench.results` stores it, with the name of its `file`
Row = dict[str, Any]


class Results:
    """The result files of a folder.

    Attributes:
        folder: where they are.
        all: the runs of all machines, the newest first.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.all: list[Run] = []
        for path in sorted(folder.glob("*.json")):
            record = json.loads(path.read_text(encoding="utf-8"))
            self.all += [{**run, "file": path.name} for run in record.get("runs", [])]
        self.all.sort(key=lambda run: run["date"], reverse=True)

    def runs(self, section: str, op: str | None = None, device: str | None = None) -> list[Run]:
        """The runs of a section, the newest first; None stands for every op or device."""
        return [
            run
            for run in self.all
            if run["section"] == section
            and op in (None, run["op"])
            and device in (None, run["device"])
        ]

    def newest(self, section: str, op: str | None = None, device: str = "cpu") -> Run | None:
        """The newest complete run of a section, if there is one."""
        found = self.runs(section, op, device)
        return next((run for run in found if run.get("status", "passed") == "passed"), None)


def row(run: Run, **wanted: str) -> Row:
    """The first row of a run with these values.

    Raises:
        ValueError: there is none.
    """
    for found in run["rows"]:
        if all(found[name] == value for name, value in wanted.items()):
            return dict(found)
    raise ValueError(f"tables: expected a row with {wanted} in {run['file']}, got none")


def ours(run: Run) -> list[Row]:
    """The rows of our kernels: not those of the reference, which is plain torch too."""
    return [r for r in run["rows"] if r["kind"] == "ours" and not r["provider"].startswith("ref")]
