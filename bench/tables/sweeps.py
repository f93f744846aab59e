# SPDX-License-Identifier: Apache-2.0
"""Whole sweeps in one batch against one generation each, and the demo from end to end."""

from __future__ import annotations

from .files import Results, Row, Run
from .markdown import Section, machine, stamp, times

AIM = 3.0  # times as fast as plain hooks


def section(results: Results) -> Section:
    """Sweeps and demo, on every machine that was measured."""
    found = Section("Whole sweeps, and the demo")
    for run in results.runs("sharing"):
        _sharing(found, run)
    for run in results.runs("demo"):
        found.add(
            f"`sidechain demo` from end to end, {stamp(run, 'make bench-demo')}:",
            ("stage", "seconds"),
            ((row["case"], f"{row['median_us'] / 1e6:.1f}") for row in run["rows"]),
        )
    if not results.runs("demo"):
        found.lines += [
            "`sidechain demo` from end to end: not measured yet (`make bench-demo`).",
            "",
        ]
    return found


def _sharing(found: Section, run: Run) -> None:
    found.add(
        "One batch for a whole sweep against one generation each with plain hooks, equal results, "
        f"end to end, {stamp(run, 'make bench-sharing')}. The aim is {AIM:g} times the speed of "
        "plain hooks. On a CPU the shared run spends its time in matrix products near the "
        "machine's rate, and rows of a sweep differ from their first step on, so little is left "
        "to share:",
        ("sweep", "way", "seconds", "one batch is faster by"),
        (
            (
                row["case"],
                row["provider"],
                f"{row['median_us'] / 1e6:.2f}",
                times(row["facts"]["x shared"]),
            )
            for row in run["rows"]
        ),
    )
    found.losses += [_loss(run, row) for row in run["rows"] if missed(row)]


def missed(row: Row) -> bool:
    """Whether a sweep is not as much faster than plain hooks as it should be."""
    return row["provider"] == "hooks" and row["facts"]["x shared"] < AIM


def _loss(run: Run, row: Row) -> str:
    return (
        f"{row['case']}: {times(row['facts']['x shared'])} against plain hooks, where {AIM:g}x is "
        f"the aim ({machine(run)}, {run['date']})."
    )
