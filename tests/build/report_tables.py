# SPDX-License-Identifier: Apache-2.0
"""The tables of `make kernels-report`: kernels, calls of the bench, before and after."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any, NamedTuple

from build.kernel_rows import GPUS, Row
from build.launches import Call


class Column(NamedTuple):
    """A column: title, text of a row, and what sorts worst first (smallest first)."""

    title: str
    text: Callable[[Row], str]
    worst: Callable[[Row], Any]


COLUMNS = {
    "registers": Column("reg", lambda r: str(r.registers), lambda r: -r.registers),
    "static": Column("static", lambda r: str(r.static), lambda r: -r.static),
    "dynamic": Column("dynamic", lambda r: str(r.dynamic), lambda r: -r.dynamic),
    "threads": Column("threads", lambda r: str(r.threads), lambda r: -r.threads),
    "blocks": Column("blocks", lambda r: str(r.blocks), lambda r: r.blocks),
    "occupancy": Column("occ", lambda r: f"{r.occupancy:.0%}", lambda r: r.occupancy),
    "narrowest": Column("narrow", lambda r: str(r.narrowest), lambda r: r.narrowest),
    "widest": Column("wide", lambda r: str(r.widest), lambda r: r.widest),
    "instructions": Column("instr", lambda r: str(r.instructions), lambda r: -r.instructions),
    "bytes": Column("bytes", lambda r: str(r.bytes), lambda r: r.bytes),
    "per_element": Column("i/elem", lambda r: f"{r.per_element:.2f}", lambda r: -r.per_element),
    "loads": Column("loads", lambda r: str(r.loads), lambda r: r.loads),
    "flight": Column("KiB", lambda r: f"{r.flight / 1024:.1f}", lambda r: r.flight),
    "issue": Column("issue", lambda r: f"{r.issue:.0%}", lambda r: r.issue),
    "kernel": Column("kernel", lambda r: r.kernel, lambda r: (r.kernel, r.arch)),
}
SPILLS = "   SPILLS"
# What a change of a kernel is judged by.
COMPARED = (
    "registers", "static", "dynamic", "threads", "blocks", "narrowest", "widest", "instructions",
    "bytes", "per_element", "loads", "flight", "issue", "stack",
)  # fmt: skip


def kernels(rows: Iterable[Row], sort: str = "kernel", *, loops: bool = False) -> str:
    """One line for each kernel, the worst in a column first; equal ones of Triton together.

    With `loops` the loops of a kernel that touch global memory follow, and its narrow accesses.
    """
    shown = sorted(_merged(rows), key=lambda pair: COLUMNS[sort].worst(pair[0]))
    lines = [[column.title for column in COLUMNS.values()]]
    lines[0][-1] += ", main loop"
    for row, count in shown:
        line = [column.text(row) for column in COLUMNS.values()]
        more = f" and {count - 1} alike" if count > 1 else ""
        spills = SPILLS if row.stack else ""
        line[-1] = f"{row.arch:6} {line[-1]}{more}  {row.loop}{spills}"
        lines.append(line)
    head, *rest = _aligned(lines).splitlines()
    if loops:
        for at, (row, _) in enumerate(shown):
            rest[at] = "\n".join([rest[at], *_loops(row)])
    return "\n".join([head, *rest])


def _loops(row: Row) -> Iterable[str]:
    for loop in row.loops:
        if loop.widths:
            widths = ", ".join(map(str, loop.widths))
            yield (
                f"{'  ' * loop.depth}{loop.source or 'loop'}: {loop.bytes} bytes, "
                f"{loop.instructions} instructions, {loop.loads} loads in flight, "
                f"accesses of {widths} bytes"
            )
    for width, places in row.narrow.items():
        yield f"  {width} bytes at {', '.join(places)}"


def calls(found: Iterable[Call]) -> str:
    """One line for each call of the bench: bytes, operations, the least time on an H100."""
    gpu = GPUS["sm_90a"]
    lines = [["MB", "Gflop", "least us", "bound", "launches", "call"]]
    for call in found:
        memory = call.moved / gpu.bytes_per_s
        matrix = call.flops / gpu.flops[call.dtype]
        lines.append([
            f"{call.moved / 1e6:.1f}", f"{call.flops / 1e9:.1f}" if call.flops else "-",
            f"{1e6 * max(memory, matrix):.1f}", "memory" if memory >= matrix else "matrix",
            str(call.launches or "-"), f"{call.op} {call.case} {call.dtype}",
        ])  # fmt: skip
    return _aligned(lines)


def compared(before: Sequence[dict[str, Any]], rows: Sequence[Row]) -> str:
    """What changed in each kernel, then those that are new or gone."""
    old = {(r["kernel"], r["arch"]): r for r in before}
    new = {(r.kernel, r.arch): asdict(r) for r in rows}
    lines = []
    for key in sorted(old.keys() & new.keys()):
        changes = [
            f"{name} {old[key][name]} -> {new[key][name]}"
            for name in COMPARED
            if old[key][name] != new[key][name]
        ]
        if changes:
            lines.append(f"{key[1]:6} {key[0]}: {', '.join(changes)}")
    lines += [f"{arch:6} {name}: new" for name, arch in sorted(new.keys() - old.keys())]
    lines += [f"{arch:6} {name}: gone" for name, arch in sorted(old.keys() - new.keys())]
    return "\n".join(lines) or "no kernel changed"


def numbered(rows: Iterable[Row]) -> list[Row]:
    """Rows with names that differ: the second of a name gets `#2`."""
    seen: Counter[tuple[str, str]] = Counter()
    found = []
    for row in rows:
        seen[row.kernel, row.arch] += 1
        number = seen[row.kernel, row.arch]
        found.append(replace(row, kernel=f"{row.kernel}#{number}") if number > 1 else row)
    return found


def _merged(rows: Iterable[Row]) -> list[tuple[Row, int]]:
    """Rows of one function that differ in nothing that is shown: the first, and how many."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        key = (row.kernel, row.arch)
        if "," in row.kernel and "#" not in row.launch and row.launch in row.kernel:
            shown = [c.text(row) for name, c in COLUMNS.items() if name != "kernel"]
            key = (row.kernel.partition("<")[0], row.arch, row.loop, *shown)
        groups.setdefault(key, []).append(row)
    return [(group[0], len(group)) for group in groups.values()]


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    """Columns to the right, the last one as it is."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]) - 1)]
    return "\n".join(
        "  ".join([*(f"{cell:>{w}}" for cell, w in zip(line[:-1], widths, strict=True)), line[-1]])
        for line in lines
    )
