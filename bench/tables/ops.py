# SPDX-License-Identifier: Apache-2.0
"""Ops against plain torch, eager and compiled."""

from __future__ import annotations

from .files import Results, Row, Run, ours
from .markdown import Section, figure, machine, stamp, times

HEAD = ("case", "dtype", "way", "{unit}", "of the limit", "against plain torch", "against compiled")
INTRO = (
    "Plain torch is the op as one would write it, eager; compiled is the same through "
    "`torch.compile`. Where plain torch has no such thing (bfloat16 Adam state, lazy updates) the "
    "time stands alone. Of the limit: the least time that the measured copy and product rates of "
    "the machine allow, over the time taken."
)


def section(results: Results) -> Section:
    """Every kernel on every CPU that was measured."""
    return _section(results, "Ops on CPUs", "cpu", "make bench-ops")


def gpu_section(results: Results) -> Section:
    """Every kernel on every GPU that was measured."""
    return _section(results, "Ops on GPUs", "cuda", "bench/gpu.sh")


def _section(results: Results, title: str, device: str, command: str) -> Section:
    runs = results.runs("ops", device=device)
    found = Section(title, [INTRO, ""] if runs else [])
    unit, scale = ("ms", 1000.0) if device == "cpu" else ("us", 1.0)
    for run in runs:
        rows = ours(run)
        slow = [row for row in rows if _slower(row)]
        verdict = (
            f"{len(slow) or 'None'} of {len(rows)} rows are slower than plain or compiled torch"
        )
        found.add(
            f"`{run['op']}`, {stamp(run, command)}. {verdict}:",
            [name.format(unit=unit) for name in HEAD],
            (_cells(row, scale) for row in rows),
        )
        found.losses += [_loss(run, row) for row in slow]
    return found.measured(title, command)


def _cells(row: Row, scale: float) -> list[str]:
    return [
        row["case"],
        row["dtype"],
        row["provider"],
        figure(row["median_us"] and row["median_us"] / scale, ".2f"),
        figure(row["share"], ".0%"),
        times(row["times_plain"]),
        times(row["times_compiled"]),
    ]


def _slower(row: Row) -> bool:
    return any((row[name] or 1.0) < 1.0 for name in ("times_plain", "times_compiled"))


def _loss(run: Run, row: Row) -> str:
    return (
        f"`{run['op']}` {row['case']} {row['dtype']}: {times(row['times_plain'])} plain torch, "
        f"{times(row['times_compiled'])} compiled ({machine(run)}, {run['date']})."
    )
