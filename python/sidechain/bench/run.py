# SPDX-License-Identifier: Apache-2.0
"""What `sidechain bench` does: measure a section, print it, store it, compare it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from . import results
from .cases import Row, run_case
from .machine import Machine

# Section -> seconds for each candidate, where nothing else is asked for.
SECTIONS = {
    "ops": 0.6, "hooks": 0.6, "sae": 5.0, "store": 2.0, "sharing": 6.0, "generation": 4.0
}  # fmt: skip
Kept = dict[results.Key, Row]  # rows that are there already
LOST, LOST_CODE = "failed: the device was lost; what follows needs a new process", 3


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
    quick: bool = False,
    keep_failed: bool = False,
) -> list[dict[str, Any]]:
    """Measure one section and print its rows as they come.

    Args:
        section: "ops", every op against plain torch, eager and compiled; "hooks", taps against
            hand-written hooks; "sae", training steps and encoders of dictionaries and what a step
            needs, against plain torch and other packages; "store", reading and writing activations
            against plain copies and one file per tensor; "sharing", sweeps in one batch against
            one generation each; "generation", whole generations with taps, eager and in a CUDA
            graph, against plain ones.
        device: "cpu" or "cuda".
        threads: of torch on the CPU. None = as they are.
        only: ops: those whose name holds this text; hooks: cases likewise; sae: shapes, or one of
            "steps", "encode", "memory"; store: sites, "read" or "write"; sharing: sweeps;
            generation: cases.
        seconds: time for each candidate; at least a few calls are timed. None = as the section has
            it.
        json: result file to merge the runs into, or a folder for `<machine>.json`. It is written
            after every row, whole, with the status "cut off" until the run is at its end.
        compare: result file to compare with.
        fresh: ops, sae and store: measure also what the file holds for this commit, machine and
            number of threads.
        quick: tiny shapes that show whether everything runs; their times mean nothing.
        keep_failed: ops: cases that failed before are not tried again.

    Returns:
        The runs, as stored. `status` is "passed" unless something of ours was wrong (its rows say
        what) or the device was lost, which ends the call.

    Raises:
        AssertionError: hooks, sharing, generation: ours computes something else.
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
    machine = Machine(device, quick=quick)
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
    wish = _Wish(only, seconds, quick, keep_failed)
    for op, kept, tables in _measured(section, machine, wish, stored):
        every, status = list(kept.values()), ""
        for every in _growing(tables, kept):
            if path:  # what is there survives a cut, marked as a part
                part = facts | {"status": "cut off"}
                results.merge(path, results.new_run(section, op, part, every))
            if not machine.alive():
                status = LOST
                break
        status = status or _status(every)
        runs.append(results.new_run(section, op, facts | {"status": status}, every))
        if path:
            results.merge(path, runs[-1])
        if status == LOST:
            print(LOST, flush=True)
            break
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
        here = {(row.case, row.dtype, row.provider) for row in new}
        yield [*new, *(row for key, row in kept.items() if key not in here)]
    if alone:
        print(results.table(new), flush=True)


@dataclass(frozen=True)
class _Wish:
    """What is asked for of a section; see `run`."""

    only: str
    seconds: float
    quick: bool
    keep_failed: bool


def _measured(
    section: str, machine: Machine, wish: _Wish, stored: Callable[[str], Kept]
) -> Iterator[tuple[str | None, Kept, Iterable[list[Row]]]]:
    """The tables of one run after the other, measured as they are taken, and what was kept."""
    if section == "ops":
        from . import ops

        for module in ops.modules(wish.only):
            kept = stored(module.OP)
            yield module.OP, kept, _cases(module, machine, wish, kept)
    elif section in ("hooks", "sharing", "generation"):
        module = importlib.import_module(f"{__package__}.{section}")
        options = {"only": wish.only, "seconds": wish.seconds, "quick": wish.quick}
        yield None, {}, module.rows(machine, **options)
    else:
        from . import sae, store

        if section == "store":
            parts = store.parts(machine, wish.only, wish.seconds)
        else:
            parts = sae.parts(machine, wish.only, wish.seconds, quick=wish.quick)
        for op, rows in parts:
            kept = stored(op)
            yield op, kept, rows(kept)


def _cases(module: ModuleType, machine: Machine, wish: _Wish, kept: Kept) -> Iterator[list[Row]]:
    """The cases of an op; one that is there, and good, is not measured again."""
    for case in module.cases(machine.device, quick=wish.quick):
        names = [(case.name, case.dtype, candidate.name) for candidate in case.candidates]
        rows = [kept[name] for name in names if name in kept]
        good = len(rows) == len(names) and not any(row.broken for row in rows)
        if good or (rows and wish.keep_failed):
            yield rows
        else:
            yield run_case(case, machine, seconds=wish.seconds)


def exit_code(runs: Iterable[Mapping[str, Any]]) -> int:
    """0 = all is well, 1 = something of ours was wrong, 3 = the device was lost."""
    statuses = {run["status"] for run in runs}
    return LOST_CODE if LOST in statuses else int(bool(statuses - {"passed"}))


def _status(rows: Iterable[Row]) -> str:
    broken = [f"{row.case} {row.dtype} {row.provider}" for row in rows if row.broken]
    return f"failed: {', '.join(broken)[:300]}" if broken else "passed"


def _headline(facts: dict[str, Any]) -> str:
    limits = ", ".join(f"{name} {value}" for name, value in facts["limits"].items())
    threads = f", {facts['threads']} thread(s)" if facts["threads"] else ""
    bare = facts["device"] == "cpu" and not facts.get("isa", "unknown")
    threads += ", NO NATIVE KERNELS: the reference runs" if bare else ""
    return f"{facts['name']}{threads}, torch {facts['versions']['torch']}: {limits}"
