# SPDX-License-Identifier: Apache-2.0
"""What `sidechain bench` does: measure a section, print it, store it, compare it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from . import results
from .cases import Row, run_case
from .machine import Machine

# Section -> seconds for each candidate, where nothing else is asked for.
SECTIONS = {"ops": 0.6, "hooks": 0.6, "sae": 5.0, "store": 2.0, "sharing": 6.0}
Kept = dict[tuple[str, str], Row]  # case, provider -> row that is there already


def run(
    section: str = "ops",
    *,
    device: str = "cpu",
    threads: int | None = None,
    only: str = "",
    seconds: float | None = None,
    json: Path | None = None,
    compare: Path | None = None,
    fresh: bool = False,
) -> list[dict[str, Any]]:
    """Measure one section and print its rows as they come.

    Args:
        section: "ops", every op against plain torch, eager and compiled; "hooks", taps against
            hand-written hooks; "sae", training steps and encoders of dictionaries and what a step
            needs, against plain torch and other packages; "store", reading and writing activations
            against plain copies and one file per tensor; "sharing", sweeps in one batch against
            one generation each.
        device: "cpu" or "cuda".
        threads: of torch on the CPU. None = as they are.
        only: ops: those whose name holds this text; hooks: cases likewise; sae: shapes, or one of
            "steps", "encode", "memory"; store: sites, "read" or "write"; sharing: sweeps.
        seconds: time for each candidate; at least a few calls are timed. None = as the section has
            it.
        json: result file to merge the runs into, or a folder for `<machine>.json`. It is written
            after every row, whole, with the status "cut off" until the run is at its end.
        compare: result file to compare with.
        fresh: sae and store: measure also what the file holds for this commit, machine and number
            of threads.

    Returns:
        The runs, as stored.

    Raises:
        AssertionError: something of ours computes something else than its reference.
        RuntimeError: no such device.
        ValueError: an unknown section or op, a file that holds no results.
    """
    if section not in SECTIONS:
        raise ValueError(f"bench: expected a section of {', '.join(SECTIONS)}, got {section!r}")
    old = results.read(compare) if compare else []
    if compare and not old:
        raise ValueError(f"bench: expected results in {compare}, got none")
    if threads is not None:
        torch.set_num_threads(threads)
    machine = Machine(device)
    path = json / f"{machine.slug}.json" if json and json.is_dir() else json
    if path:
        results.read(path)  # a file of something else is refused before an hour is spent
    facts = machine.facts()
    print(_headline(facts), flush=True)
    seconds = SECTIONS[section] if seconds is None else seconds

    def stored(op: str) -> Kept:
        if fresh or path is None:
            return {}
        return results.kept(path, results.new_run(section, op, facts, []))

    runs = []
    for op, kept, tables in _measured(section, machine, only, seconds, stored):
        every = list(kept.values())
        for every in _growing(tables, kept):
            if path:  # what is there survives a cut, marked as a part
                part = facts | {"status": "cut off"}
                results.merge(path, results.new_run(section, op, part, every))
        runs.append(results.new_run(section, op, facts | {"status": "passed"}, every))
        if path:
            results.merge(path, runs[-1])
    if path:
        print(f"written to {path}")
    if old:
        print(results.comparison(runs, old))
    return runs


def _growing(tables: Iterable[list[Row]], kept: Kept) -> Iterator[list[Row]]:
    """Print tables as they come; yield all rows so far, and those of before that are no part of it.

    Rows that come alone are printed as lines, and once more as a table at the end.
    """
    new: list[Row] = []
    alone = False
    for rows in tables:
        alone |= len(rows) == 1
        print(results.line(rows[0]) if len(rows) == 1 else results.table(rows), flush=True)
        new += rows
        here = {(row.case, row.provider) for row in new}
        yield [*new, *(row for key, row in kept.items() if key not in here)]
    if alone:
        print(results.table(new), flush=True)


def _measured(
    section: str, machine: Machine, only: str, seconds: float, stored: Callable[[str], Kept]
) -> Iterator[tuple[str | None, Kept, Iterable[list[Row]]]]:
    """The tables of one run after the other, measured as they are taken, and what was kept."""
    if section == "ops":
        from . import ops

        for module in ops.modules(only):
            cases = module.cases(machine.device)
            tables = (run_case(case, machine, seconds=seconds) for case in cases)
            yield module.OP, {}, tables
    elif section == "hooks":
        from . import hooks

        yield None, {}, hooks.rows(machine, only=only, seconds=seconds)
    elif section == "sharing":
        from . import sharing

        yield None, {}, sharing.rows(machine, only=only, seconds=seconds)
    else:
        from . import sae, store

        parts = (sae if section == "sae" else store).parts
        for op, rows in parts(machine, only, seconds):
            kept = stored(op)
            yield op, kept, rows(kept)


def _headline(facts: dict[str, Any]) -> str:
    limits = ", ".join(f"{name} {value}" for name, value in facts["limits"].items())
    threads = f", {facts['threads']} thread(s)" if facts["threads"] else ""
    bare = facts["device"] == "cpu" and not facts.get("isa", "unknown")
    threads += ", NO NATIVE KERNELS: the reference runs" if bare else ""
    return f"{facts['name']}{threads}, torch {facts['versions']['torch']}: {limits}"
