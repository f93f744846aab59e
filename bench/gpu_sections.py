# SPDX-License-Identifier: Apache-2.0
"""The sections of `bench/gpu.sh run`: each its own process, merged into one result file.

A section that failed or ran out of time is stored as such and does not stop the others.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sidechain.bench import ops, results
from sidechain.bench.machine import Machine

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
TESTS = ("tests/ops", "tests/triton", "tests/taps", "tests/sae", "tests/store")
SANITIZER = "compute-sanitizer"


@dataclass(frozen=True)
class Unit:
    """What is run and stored at once: a section, or one op of it."""

    section: str
    op: str | None
    seconds: float  # most it may take
    work: Callable[[Session, Unit, float], dict[str, Any] | None]  # None: it stores itself


class Session:
    """One call of `gpu.sh run`.

    Args:
        device: "cuda" or "cpu".
        out: folder of the result file.
        budget: seconds after which nothing is started any more.
        again: measure also what is there for this commit.
    """

    def __init__(self, device: str, out: Path, budget: float, *, again: bool = False) -> None:
        self.machine = Machine(device)
        self.device, self.again = device, again
        self.path = out / f"{self.machine.slug}.json"
        self.until = time.monotonic() + budget
        self.commit = results.commit()
        out.mkdir(parents=True, exist_ok=True)
        stored = RESULTS / self.path.name
        if not self.path.exists() and stored.exists():
            shutil.copyfile(stored, self.path)

    def facts(self) -> dict[str, Any]:
        """What makes this device and thread count a run of its own."""
        return {"device": self.device, "name": self.machine.name}

    def done(self, unit: Unit) -> bool:
        """Whether this commit has a good run of it on this device."""
        return any(
            run["section"] == unit.section
            and run["op"] == unit.op
            and run["device"] == self.device
            and run["commit"] == self.commit
            and run.get("status", "passed") in ("passed", "skipped")
            for run in results.read(self.path)
        )

    def store(self, unit: Unit, facts: dict[str, Any]) -> None:
        """Merge the outcome of a unit into the file."""
        run = results.new_run(unit.section, unit.op, self.facts() | {"threads": None} | facts, [])
        results.merge(self.path, run)

    def left(self) -> float:
        """Seconds until the budget is spent."""
        return self.until - time.monotonic()

    def process(self, command: Sequence[str], limit: float) -> tuple[str, str]:
        """Run a command in the repository; (status, last lines of what it printed)."""
        try:
            done = subprocess.run(
                command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                timeout=limit, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            text = error.stdout or b""
            text = text.decode(errors="replace") if isinstance(text, bytes) else text
            return "cut off", text
        status = "passed" if done.returncode == 0 else f"failed with exit code {done.returncode}"
        return status, done.stdout


def correctness(session: Session, unit: Unit, limit: float) -> dict[str, Any]:
    """The case tables of all ops, every backend of the device."""
    command = [sys.executable, "-m", "sidechain.bench.small", "--device", session.device]
    status, text = session.process(command, limit)
    found = _last_json(text)
    return {"status": status, "ops": found.get("ops", {}), "failures": found.get("failed", []),
            "log": _tail(text) if status != "passed" else []}  # fmt: skip


def tests(session: Session, unit: Unit, limit: float) -> dict[str, Any]:
    """What pytest marks as needing a GPU; a folder whose packages are missing is named."""
    folders = [folder for folder in TESTS if (ROOT / folder).is_dir()]
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu",
        "--continue-on-collection-errors", "-rfE", *folders,
    ]  # fmt: skip
    status, text = session.process(command, limit)
    if status == "failed with exit code 5":  # nothing was selected
        status = "skipped"
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|error)", text)}
    if session.device == "cuda" and status in ("passed", "skipped") and not counts.get("passed"):
        status = "failed: no test ran on the GPU"
    return {"status": status, "counts": counts, "log": _tail(text) if status != "passed" else []}


def sanitizer(session: Session, unit: Unit, limit: float) -> dict[str, Any]:
    """The small cases of one op under memcheck, then racecheck."""
    tool = shutil.which(SANITIZER) or shutil.which(f"/usr/local/cuda/bin/{SANITIZER}")
    if tool is None or session.device == "cpu":
        return {"status": "skipped", "log": [f"{SANITIZER} is not here"]}
    found: dict[str, Any] = {"status": "passed", "tools": {}}
    stop = time.monotonic() + limit
    for name in ("memcheck", "racecheck"):
        command = [
            # Without its cache every tensor is an allocation of its own, with ends to run over.
            "env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1",
            tool, "--tool", name, "--error-exitcode", "99", sys.executable, "-m",
            "sidechain.bench.small", "--device", "cuda", "--only", unit.op or "", "--most", "12",
        ]  # fmt: skip
        status, text = session.process(command, max(1.0, stop - time.monotonic()))
        summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", text)
        found["tools"][name] = {"status": status, "summary": summary[-1:] or _tail(text, 4)}
        if status != "passed":
            found["status"], found["log"] = status, _tail(text)
    return found


def bench(session: Session, unit: Unit, limit: float) -> dict[str, Any] | None:
    """One run of the command `bench`, which stores its rows itself."""
    if unit.section in ("hooks", "sharing") and importlib.util.find_spec("diffusers") is None:
        return {"status": "skipped", "log": ["diffusers is not here"]}
    options = ["--device", session.device, "--json", str(session.path), "--seconds", "0.25"]
    if session.device == "cpu":
        options += ["--threads", "1"]
    if session.again:
        options.append("--fresh")
    command = [sys.executable, "-m", "sidechain", "bench", unit.section, *options]
    status, text = session.process([*command, "--only", unit.op or ""], limit)
    print(text, flush=True)
    stored = status == "passed" or any(
        run["section"] == unit.section and run["op"] == unit.op and run["commit"] == session.commit
        for run in results.read(session.path)
    )
    # Rows that are there already are not written over by a report of what became of the rest.
    return None if stored else {"status": status, "log": _tail(text)}


def units() -> list[Unit]:
    """Every unit, in the order they are run: proofs first."""
    names = [module.OP for module in ops.modules()]
    return [
        Unit("correctness", None, 90, correctness),
        *(Unit("ops", op, 180, bench) for op in names),
        Unit("sae", "steps", 120, bench),
        Unit("sae", "encode", 60, bench),
        Unit("sae", "memory", 60, bench),
        Unit("tests", None, 120, tests),
        *(Unit("sanitizer", op, 90, sanitizer) for op in names),
        Unit("hooks", None, 60, bench),
        Unit("sharing", None, 120, bench),
    ]


def run(session: Session, chosen: Sequence[Unit]) -> int:
    """Run the units that are not done; returns how many failed."""
    failures = 0
    for unit in chosen:
        title = f"== {unit.section} {unit.op or ''}".rstrip()
        if not session.again and session.done(unit):
            print(f"{title}: already there for {session.commit}", flush=True)
            continue
        if session.left() < 5:
            print(f"{title}: not started, the time is spent; run again to go on", flush=True)
            failures += 1
            continue
        print(title, flush=True)
        start = time.monotonic()
        outcome = unit.work(session, unit, min(unit.seconds, session.left()))
        status = outcome["status"] if outcome is not None else _stored_status(session, unit)
        if outcome is not None:
            session.store(unit, outcome | {"seconds": round(time.monotonic() - start, 1)})
            print("\n".join(outcome.get("log", [])))
        print(f"{title}: {status}, {time.monotonic() - start:.0f} s", flush=True)
        failures += status not in ("passed", "skipped")
    return failures


def _stored_status(session: Session, unit: Unit) -> str:
    """What became of a unit that stores itself."""
    return "passed" if session.done(unit) else "cut off"


def _last_json(text: str) -> dict[str, Any]:
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            found: dict[str, Any] = json.loads(line)
            return found
    return {}


def _tail(text: str, lines: int = 25) -> list[str]:
    return [line[:300] for line in text.splitlines()[-lines:]]


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, say where the file is; 1 if something failed or was not started."""
    every = units()
    names = list(dict.fromkeys(unit.section for unit in every))
    parser = argparse.ArgumentParser(prog="bench/gpu.sh run", description=__doc__)
    parser.add_argument("section", nargs="*", metavar="SECTION", help=f"of {', '.join(names)}")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--budget", type=float, default=460.0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    unknown = sorted({*options.section} - {*names})
    if unknown:
        parser.error(f"expected sections of {', '.join(names)}, got {unknown[0]}")
    session = Session(options.device, options.out, options.budget, again=options.again)
    chosen = [u for u in every if not options.section or u.section in options.section]
    failures = run(session, chosen)
    print(f"{session.path}: {failures} of {len(chosen)} to be looked at")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
