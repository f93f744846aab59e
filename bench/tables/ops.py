# SPDX-License-Identifier: Apache-2.0
"""Ops against plain torch, eager and compiled."""

from __future__ import annotations

from .files import Results, Row, Run, ours
from .markdown import Section, figure, machine, stamp, times


def section(results: Results) -> Section:
    """Every kernel on every CPU that was measured."""
    found = Section("Ops on CPUs")
    for run in results.runs("ops", device="cpu"):
        found.add(
            f"`{run['op']}`, {stamp(run, 'make bench-ops')}. {_verdict(run)}",
            ("case", "dtype", "way", "ms", "against plain torch", "against compiled"),
            (
                (
                    row["case"],
                    row["dtype"],
                    row["provider"],
                    f"{row['median_us'] / 1000:.2f}",
                    times(row["times_plain"]),
                    times(row["times_compiled"]),
                )
                for row in ours(run)
            ),
        )
        found.losses += _losses(run)
    if found.lines:
        found.lines = [
            "Plain torch is the op as one would write it, eager; compiled is the same through "
            "`torch.compile`. Where plain torch has no such thing (bfloat16 Adam state, lazy "
            "updates) the time stands alone.",
            "",
            *found.lines,
        ]
    return found.measured("Ops on CPUs", "make bench-ops")


def gpu_section(results: Results) -> Section:
    """Every kernel on every GPU that was measured."""
    found = Section("Ops on GPUs")
    for run in results.runs("ops", device="cuda"):
        found.add(
            f"`{run['op']}`, {stamp(run, 'bench/gpu.sh')}. {_verdict(run)}",
            (
                *("case", "dtype", "backend", "us", "of the limit"),
                *("against plain torch", "against compiled"),
            ),
            (
                (
                    row["case"],
                    row["dtype"],
                    row["provider"],
                    figure(row["median_us"], ".1f"),
                    figure(row["share"], ".0%"),
                    times(row["times_plain"]),
                    times(row["times_compiled"]),
                )
                for row in ours(run)
            ),
        )
        found.losses += _losses(run)
    return found.measured("Ops on GPUs", "bench/gpu.sh")


def slower(row: Row) -> bool:
    """Whether a row loses against plain or compiled torch."""
    return any((row[name] or 1.0) < 1.0 for name in ("times_plain", "times_compiled"))


def _verdict(run: Run) -> str:
    count = sum(slower(row) for row in ours(run))
    if not count:
        return "No row is slower than plain or compiled torch:"
    return f"{count} of {len(ours(run))} rows are slower than plain or compiled torch:"


def _losses(run: Run) -> list[str]:
    return [
        f"`{run['op']}` {row['case']} {row['dtype']}: {times(row['times_plain'])} plain torch, "
        f"{times(row['times_compiled'])} compiled ({machine(run)}, {run['date']})."
        for row in ours(run)
        if slower(row)
    ]
