# SPDX-License-Identifier: Apache-2.0
"""Tables, figures and captions as they stand in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from .files import Run


@dataclass
class Section:
    """One subject of RESULTS.md.

    Attributes:
        title: its heading.
        lines: text and tables.
        losses: one sentence for each place where we lose.
    """

    title: str
    lines: list[str] = field(default_factory=list)
    losses: list[str] = field(default_factory=list)

    def add(self, caption: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Append a table under its caption."""
        self.lines += [caption, "", *table(head, rows), ""]

    def measured(self, what: str, command: str) -> Section:
        """Return this section; where it has no line, say that nothing was measured."""
        if not self.lines:
            self.lines = [f"{what}: not measured yet (`{command}`).", ""]
        return self


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table; columns that are empty in every row are left out."""
    cells = [list(row) for row in rows]
    kept = [i for i in range(len(head)) if not cells or any(row[i] for row in cells)]
    lines = [f"| {' | '.join(line[i] for i in kept)} |" for line in (head, *cells)]
    return [lines[0], "|---" * len(kept) + "|", *lines[1:]]


def times(value: float | None) -> str:
    """A ratio: 2.00x."""
    return figure(value, ".2f", "x")


def figure(value: float | None, form: str, unit: str = "") -> str:
    """A number with its unit; blank where there is none."""
    return "" if value is None else format(value, form) + unit


def machine(run: Run) -> str:
    """Where a run was measured."""
    isa = f", {run['isa']}" if run.get("isa") else ""
    threads = f", {run['threads']} thread(s)" if run["threads"] else ""
    return f"{run['name']}{isa}{threads}"


def stamp(run: Run, command: str) -> str:
    """Where and when a run was measured, with what, and by which command."""
    status = "" if run.get("status", "passed") == "passed" else f"; {run['status']}"
    cuda = f", CUDA {run['versions']['cuda']}" if run["device"] == "cuda" else ""
    return (
        f"{machine(run)}, {run['date']}, torch {run['versions']['torch']}{cuda}, commit "
        f"{run['commit']}, file `{run['file']}` (`{command}`{status})"
    )
