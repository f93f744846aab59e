# SPDX-License-Identifier: Apache-2.0
"""The work of `sidechain bench`: measure a section, print it, store it, compare it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch

from . import results
from .cases import Row, run_case
from .config import SECTIONS, BenchSettings
from .machine import Machine

Kept = dict[results.Key, Row]  # rows that are there already
LOST, LOST_CODE = "failed: the device was lost; what follows needs a new process", 3


def run(settings: BenchSettings) -> list[dict[str, Any]]:
    """Measure one section and print its rows as they come.

    Returns:
        The runs, as stored. `status` is "passed" unless something of ours was wrong (its rows say
        what) or the device was lost, which ends the call.

    Raises:
        AssertionError: hooks, sharing, generation: ours computes something else.
        RuntimeError: no such device.
        ValueError: an unknown op or part, a file that holds no results.
    """
    compare, json = settings.compare, settings.json
    old = results.read(compare) if compare else []
    if compare and not old:
        raise ValueError(f"bench: expected results in {compare}, got none")
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    machine = Machine(settings.device, quick=settings.quick)
    path = json / f"{machine.slug}.json" if json and json.is_dir() else json
    if path:
        results.read(path)  # any other file is refused before the measurement
    facts = machine.facts()
    print(_headline(facts), flush=True)
    section = settings.section
    if settings.seconds is None:
        settings = replace(settings, seconds=SECTIONS[section])

    def stored(op: str) -> Kept:
        if settings.fresh or path is None:
            return {}
        return results.kept(path, results.new_run(section, op, facts, []))

    runs = []
    for op, kept, tables in _measured(settings, machine, stored):
        every, status = list(kept.values()), ""
        for every in _growing(tables, kept):
            if path:  # an interrupted run keeps its rows, marked as incomplete
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
    """Print tables as they come; yield all rows so far, and the kept rows that they do not replace.

    Single rows are printed as lines, and again as a table at the end.
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


def _measured(
    settings: BenchSettings, machine: Machine, stored: Callable[[str], Kept]
) -> Iterator[tuple[str | None, Kept, Iterable[list[Row]]]]:
    """Yield each run of a section: its op, the kept rows, and tables measured as they are taken."""
    only, seconds, quick = settings.only, settings.seconds or 0.0, settings.quick
    if settings.section == "ops":
        from . import ops

        for module in ops.modules(only):
            kept = stored(module.OP)
            yield module.OP, kept, _cases(module, machine, settings, kept)
    elif settings.section in ("sae", "store"):
        from . import sae, store

        if settings.section == "store":
            parts = store.parts(machine, only, seconds)
        else:
            parts = sae.parts(machine, only, seconds, quick=quick)
        for op, rows in parts:
            kept = stored(op)
            yield op, kept, rows(kept)
    else:
        module = importlib.import_module(f"{__package__}.{settings.section}")
        yield None, {}, module.rows(machine, only=only, seconds=seconds, quick=quick)


def _cases(
    module: ModuleType, machine: Machine, settings: BenchSettings, kept: Kept
) -> Iterator[list[Row]]:
    """Measure the cases of an op; a case with good kept rows is not measured again."""
    for case in module.cases(machine.device, quick=settings.quick):
        names = [(case.name, case.dtype, candidate.name) for candidate in case.candidates]
        rows = [kept[name] for name in names if name in kept]
        good = len(rows) == len(names) and not any(row.broken for row in rows)
        if good or (rows and settings.keep_failed):
            yield rows
        else:
            yield run_case(case, machine, seconds=settings.seconds or 0.0)


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
