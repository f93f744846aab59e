# SPDX-License-Identifier: Apache-2.0
"""One call on the host: its result file, its time, and the processes it starts."""

from __future__ import annotations

import contextlib
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sidechain.bench import results
from sidechain.bench.machine import Machine

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
GOOD = ("passed", "skipped")
CUT = "cut off"
# status and what was printed
Outcome = tuple[str, str]


class Session:
    """State of one call.

    Args:
        device: "cuda" or "cpu".
        out: folder of the result file.
        budget: seconds after which no unit is started.
        again: also measure what the file already has for this commit.
        quick: tiny shapes, to see that everything runs.
        short: fork instead of starting processes, and collect few tests: for CI.
    """

    def __init__(
        self,
        device: str,
        out: Path,
        budget: float,
        *,
        again: bool = False,
        quick: bool = False,
        short: bool = False,
    ) -> None:
        self.machine = Machine(device)
        self.device, self.again, self.quick, self.short = device, again, quick, short
        self.path = out / f"{self.machine.slug}.json"
        self.until = time.monotonic() + budget
        self.commit = results.commit()
        out.mkdir(parents=True, exist_ok=True)
        self._take_over(RESULTS / self.path.name)

    def _take_over(self, stored: Path) -> None:
        """Merge the runs of an earlier call, except where this file has better ones."""
        if stored.resolve() == self.path.resolve():
            return
        here = {_identity(run): run for run in results.read(self.path)}
        for run in results.read(stored):
            mine = here.get(_identity(run))
            if mine is None or self._worth(run) > self._worth(mine):
                results.merge(self.path, run)

    def _worth(self, run: dict[str, Any]) -> tuple[bool, bool]:
        return run["commit"] == self.commit, run.get("status", "passed") in GOOD

    def stored(self, section: str, op: str | None) -> dict[str, Any] | None:
        """Return the stored run of a unit for this commit and device, or None."""
        for run in results.read(self.path):
            same = (run["section"], run["op"], run["device"], run["commit"])
            if same == (section, op, self.device, self.commit):
                return run
        return None

    def done(self, section: str, op: str | None) -> bool:
        """Whether the file has a good run of a unit."""
        run = self.stored(section, op)
        return run is not None and run.get("status", "passed") in GOOD

    def store(self, section: str, op: str | None, facts: dict[str, Any]) -> str:
        """Store facts of a unit in the file, beside the rows that it wrote itself.

        Returns:
            Its status.
        """
        own = {"device": self.device, "name": self.machine.name, "threads": None}
        run = self.stored(section, op) or results.new_run(section, op, own, [])
        results.merge(self.path, run | facts)
        return str((run | facts)["status"])

    def left(self) -> float:
        """Seconds until the budget is spent."""
        return self.until - time.monotonic()

    def module(self, name: str, arguments: Sequence[str], limit: float) -> Outcome:
        """Run `python -m name` in the repository."""
        if self.short:
            return _forked(name, arguments, limit)
        return self.process([sys.executable, "-m", name, *arguments], limit)

    def process(self, command: Sequence[str], limit: float) -> Outcome:
        """Run a command in the repository; end it and its children at the limit."""
        with tempfile.TemporaryFile() as text:
            # Its own process group: compilers and test workers must not outlive a unit on the GPU.
            child = subprocess.Popen(
                command, cwd=ROOT, stdout=text, stderr=subprocess.STDOUT, process_group=0
            )
            code = _wait(child.pid, limit, lambda: child.poll())
            text.seek(0)
            return _status(code), text.read().decode(errors="replace")


def _identity(run: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(run.get(key) for key in results.IDENTITY)


def _status(code: int | None) -> str:
    if code is None:
        return CUT
    return "passed" if code == 0 else f"failed with exit code {code}"


def _wait(pid: int, limit: float, poll: Callable[[], int | None]) -> int | None:
    """Wait for a child that leads a group: its exit code, or None if it was ended at the limit."""
    stop = time.monotonic() + limit
    try:
        while (code := poll()) is None and time.monotonic() < stop:
            time.sleep(0.02)
        return code
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        while poll() is None:
            time.sleep(0.02)


def _forked(name: str, arguments: Sequence[str], limit: float) -> Outcome:
    """Run a module in a fork of this process, which has imported torch already."""
    with tempfile.TemporaryFile() as text:
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, 0)
            os.chdir(ROOT)
            os.dup2(text.fileno(), 1)
            os.dup2(text.fileno(), 2)
            os._exit(_run(name, arguments))
        ended: list[int] = []

        def poll() -> int | None:
            if not ended:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    ended.append(os.waitstatus_to_exitcode(status))
            return ended[0] if ended else None

        code = _wait(pid, limit, poll)
        text.seek(0)
        return _status(code), text.read().decode(errors="replace")


def _run(name: str, arguments: Sequence[str]) -> int:
    """Run a module as the program and return its exit code."""
    sys.argv = [name, *arguments]
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    code: object = 0
    try:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code if isinstance(code, int) else int(code is not None)
