# SPDX-License-Identifier: Apache-2.0
"""What `sidechain bench` does: measure a section, print it, store it, compare it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from . import results
from .cases import Row, run_case
from .machine import Machine

SECTIONS = ("ops", "hooks", "sae")


def run(
    section: str = "ops",
    *,
    device: str = "cpu",
    threads: int | None = None,
    only: str = "",
    seconds: float = 0.6,
    json: Path | None = None,
    compare: Path | None = None,
) -> list[dict[str, Any]]:
    """Measure one section and print its tables as they come.

    Args:
        section: "ops", every op against plain torch, eager and compiled; "hooks", taps against
            hand-written hooks; "sae", training steps against plain torch and other packages.
        device: "cpu" or "cuda".
        threads: of torch on the CPU. None = as they are.
        only: ops: those whose name holds this text; hooks and sae: cases likewise.
        seconds: time for each candidate; sae has its own number of steps.
        json: result file to merge the runs into, or a folder for `<machine>.json`. A run that was
            cut off is stored as far as it went, with the status "cut off".
        compare: result file to compare with.

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
    runs = []
    for op, tables in _measured(section, machine, only, seconds):
        every: list[Row] = []
        for rows in tables:
            print(results.table(rows), flush=True)
            every += rows
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


def _measured(
    section: str, machine: Machine, only: str, seconds: float
) -> Iterator[tuple[str | None, Iterable[list[Row]]]]:
    """The tables of one run after the other, measured as they are taken."""
    if section == "ops":
        from . import ops

        for module in ops.modules(only):
            cases = module.cases(machine.device)
            yield module.OP, (run_case(case, machine, seconds=seconds) for case in cases)
    elif section == "hooks":
        from . import hooks

        yield None, hooks.rows(machine, only=only, seconds=seconds)
    else:
        from .sae import memory, race

        if only in "steps" or any(only in shape.name for shape in race.SHAPES[machine.device]):
            shapes = "" if only in "steps" else only
            yield "steps", race.rows(machine, only=shapes)
        if only in "memory":
            yield "memory", [memory.rows(machine.device)]


def _headline(facts: dict[str, Any]) -> str:
    limits = ", ".join(f"{name} {value}" for name, value in facts["limits"].items())
    threads = f", {facts['threads']} thread(s)" if facts["threads"] else ""
    return f"{facts['name']}{threads}, torch {facts['versions']['torch']}: {limits}"
