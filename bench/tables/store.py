# SPDX-License-Identifier: Apache-2.0
"""Reading and writing activations."""

from __future__ import annotations

from .files import Results, Row, Run, ours
from .markdown import Section, machine, stamp, times

COMMAND = "make bench-sae"
READ_AIM = 0.8  # of a plain copy
WRITE_AIM = 10.0  # times the speed of files


def section(results: Results) -> Section:
    """Both ways, on every machine that was measured."""
    found = Section("Store of activations")
    for run in results.runs("store", "read"):
        _read(found, run)
    for run in results.runs("store", "write"):
        _write(found, run)
    return found.measured("Reading and writing a store", COMMAND)


def _read(found: Section, run: Run) -> None:
    found.add(
        f"Reading batches of a store from the page cache in random order, {stamp(run, COMMAND)}. "
        "`gather` and `batches` are the store's; `memcpy` copies neighbouring rows; `index_select` "
        "and `take` gather the same random rows with torch and NumPy. The aim is "
        f"{READ_AIM:.0%} of `memcpy`:",
        ("site", "bytes a row", "way", "GB/s", "of memcpy"),
        (
            (
                row["case"],
                str(2 * int(row["case"].rsplit("-C", 1)[1])),
                row["provider"],
                f"{row['gbytes_per_s']:.2f}",
                f"{row['facts']['of memcpy']:.0%}",
            )
            for row in run["rows"]
        ),
    )
    for row in ours(run):
        share = row["facts"]["of memcpy"]
        rivals = _faster(run, row)
        against = f", slower than {' and '.join(f'`{name}`' for name in rivals)}" if rivals else ""
        if share < READ_AIM:
            found.losses.append(
                f"`{row['provider']}` reads {row['case']} at {share:.0%} of `memcpy`, where "
                f"{READ_AIM:.0%} is the aim{against} ({machine(run)}, {run['date']})."
            )


def _faster(run: Run, row: Row) -> list[str]:
    """Plain ways to gather the same rows that are faster."""
    return [
        other["provider"]
        for other in run["rows"]
        if other["case"] == row["case"]
        and other["kind"] == "plain"
        and other["provider"] != "memcpy"
        and other["gbytes_per_s"] > row["gbytes_per_s"]
    ]


def _write(found: Section, run: Run) -> None:
    found.add(
        "Writing the output of a site, one write or one file for each sample, "
        f"{stamp(run, COMMAND)}. The store always syncs to disk. The aim is {WRITE_AIM:g} times "
        "the speed of files:",
        ("site", "way", "MB/s", "the store is faster by"),
        (
            (
                row["case"],
                row["provider"],
                f"{1000 * row['gbytes_per_s']:.0f}",
                times(row["facts"]["x ours"]),
            )
            for row in run["rows"]
        ),
    )
    found.losses += [
        f"writing {row['case']} the store is {times(row['facts']['x ours'])} as fast as "
        f"`{row['provider']}`, where {WRITE_AIM:g}x is the aim ({machine(run)}, {run['date']})."
        for row in run["rows"]
        if row["kind"] == "plain" and row["facts"]["x ours"] < WRITE_AIM
    ]
