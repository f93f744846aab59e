# SPDX-License-Identifier: Apache-2.0
"""The command line behind `bench/gpu.sh`: plan, run, rehearse."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from sidechain.bench import results

from . import aims, plan
from .plan import CALLS, LIMIT, Unit
from .session import CUT, GOOD, RESULTS, Session

AIMS = ("aims", None)
REHEARSED = 300.0  # seconds of a unit and
REHEARSALS = 1800.0  # of a call of a rehearsal


def run(session: Session, units: Sequence[Unit]) -> list[str]:
    """Run the units that are not done.

    Returns:
        Title and status of each unit that is not good.
    """
    bad = []
    for unit in units:
        title = f"== {unit.title}"
        # Limits and compiled kernels belong to the machine of this call, not to an earlier one.
        lasts = unit.section not in ("machine", "warm")
        if lasts and not session.again and session.done(unit.section, unit.op):
            print(f"{title}: already there for {session.commit}", flush=True)
            continue
        if session.left() < 5:
            print(f"{title}: not started, the time is spent", flush=True)
            bad.append(f"{unit.title}: not started")
            continue
        print(title, flush=True)
        start = time.monotonic()
        status = one(session, unit)
        spent = time.monotonic() - start
        print(f"{title}: {status}, {spent:.0f} s of {unit.seconds:.0f}", flush=True)
        if status not in GOOD:
            explain(session, unit)
            bad.append(f"{unit.title}: {status}")
    return bad


def explain(session: Session, unit: Unit) -> None:
    """Print the reasons for a unit that is not good; units with rows have printed theirs."""
    known = session.stored(unit.section, unit.op) or {}
    if not known.get("rows"):
        lines = [*map(str, known.get("failed", [])), *known.get("log", [])]
        print("\n".join(lines), flush=True)


def one(session: Session, unit: Unit) -> str:
    """Run a unit; a fault of the harness itself is stored like any other."""
    start = time.monotonic()
    # A rehearsal only asks whether everything runs, also on a busy machine.
    limit = min(REHEARSED if session.quick else unit.seconds, session.left())
    try:
        status = unit.work(session, unit.section, unit.op, limit)
    except Exception as error:
        status = f"failed: {type(error).__name__}: {error}"[:300]
    spent = round(time.monotonic() - start, 1)
    return session.store(unit.section, unit.op, {"status": status, "seconds": spent})


def summary(session: Session) -> None:
    """Print the aims and store them."""
    found = aims.table(results.read(session.path))
    print(aims.text(found), flush=True)
    if session.device == "cuda":
        session.store(*AIMS, {"status": "passed", "aims": found})


def advice(session: Session, words: Sequence[str], bad: Sequence[str]) -> str:
    """Return what to do next."""
    lines = [f"{line}" for line in bad]
    numbers = [int(word) for word in words if word.isdigit()]
    again = any(line.endswith(("not started", CUT)) for line in bad)
    home = f"{session.path} -> {RESULTS / session.path.name}"
    lines.append(f"now: bring the result file home, into the tree: {home}; commit it")
    if again:
        lines.append(f"next: bench/gpu.sh run {' '.join(words)}  (continues where it stopped)")
    elif numbers and max(numbers) < max(CALLS):
        lines.append(f"next: bench/gpu.sh run {max(numbers) + 1}  (merges what is in the tree)")
    else:
        lines.append("next: mend what failed, then the aim that is missed by most")
    return "\n".join(lines)


def rehearse(*, short: bool) -> int:
    """Run all three calls on the CPU with tiny shapes; 1 unless every unit is stored and good."""
    print(plan.text())
    missing = []
    with tempfile.TemporaryDirectory() as place:
        for number, units in CALLS.items():
            # Each call begins with the file of the one before, as on the host.
            session = Session("cpu", Path(place), REHEARSALS, quick=True, short=short)
            start = time.monotonic()
            bad = run(session, units)
            print(f"call {number}: {time.monotonic() - start:.0f} s\n" + "\n".join(bad))
            missing += bad
            missing += [
                f"{unit.title}: no run in the file"
                for unit in units
                if session.stored(unit.section, unit.op) is None
            ]
        summary(session)
        runs = results.read(session.path)
        print(f"{session.path.name}: {len(runs)} runs of {session.machine.name}")
    verdict = "rehearsal: failed" if missing else "rehearsal: every unit is in the file"
    print("\n".join([*missing, verdict]))
    return int(bool(missing))


def main(argv: Sequence[str] | None = None) -> int:
    """Parse arguments and run; returns 1 if a unit is not good."""
    parser = argparse.ArgumentParser(prog="bench/gpu.sh", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("plan", help="print what each call does and how long it may take")
    rehearsal = commands.add_parser("rehearse", help="all calls on the CPU, tiny")
    rehearsal.add_argument("--short", action="store_true", help="few tests, forked: for CI")
    command = commands.add_parser("run", help="run calls or sections")
    command.add_argument("what", nargs="*", metavar="CALL|SECTION")
    command.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    command.add_argument("--again", action="store_true")
    command.add_argument("--quick", action="store_true")
    command.add_argument("--budget", type=float, default=LIMIT)
    command.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    if options.command == "plan":
        print(plan.text())
        return 0
    if options.command == "rehearse":
        return rehearse(short=options.short)
    try:
        units = plan.chosen(options.what)
    except ValueError as error:
        parser.error(str(error))
    session = Session(
        options.device, options.out, options.budget, again=options.again, quick=options.quick
    )
    total = sum(unit.seconds for unit in units)
    print(f"{len(units)} units, {total:.0f} s at most; stops after {options.budget:.0f} s")
    bad = run(session, units)
    summary(session)
    print(advice(session, options.what, bad))
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
