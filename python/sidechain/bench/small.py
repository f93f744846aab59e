# SPDX-License-Identifier: Apache-2.0
"""Correctness without pytest: `python -m sidechain.bench.small [--device cuda] [--only TEXT]`.

Every case of every op once, each backend of the device against the reference in float64. A
sanitizer can watch this, and a host without the test packages can run it. With `--json FILE` the
outcome of every case is in the file before the next one starts, and what has passed for this
commit is not run again. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from . import ops, results
from .cases import Candidate, Case, reason
from .machine import Machine
from .run import LOST, LOST_CODE

SECTION = "correctness"


class Proof:
    """The outcome of the cases of one op, kept in a result file if there is one.

    Args:
        op: its name.
        machine: where.
        path: result file. None = nowhere.
        fresh: run also what the file says has passed.
        keep_failed: do not run again what the file says has failed.
    """

    def __init__(
        self, op: str, machine: Machine, path: Path | None, *, fresh: bool, keep_failed: bool
    ) -> None:
        self.op, self.path = op, path
        self.facts = {"device": machine.device, "name": machine.name, "threads": None}
        self.passed: dict[str, list[str]] = {}
        self.failed: list[list[str]] = []
        if path is not None and not fresh:
            new = results.new_run(SECTION, op, self.facts, [])
            same = (*results.IDENTITY, "commit", "name")
            for run in results.read(path):
                if all(run.get(key) == new[key] for key in same):
                    self.passed = run.get("passed", {})
                    self.failed = run.get("failed", []) if keep_failed else []
        self._done = {(b, name) for b, names in self.passed.items() for name in names}
        self._done |= {(backend, f"{case} {dtype}") for case, dtype, backend, _ in self.failed}

    def done(self, case: Case, candidate: Candidate) -> bool:
        """Whether a case need not be run."""
        return (candidate.name, f"{case.name} {case.dtype}") in self._done

    def add(self, case: Case, candidate: Candidate, error: str | None) -> None:
        """Add the outcome of a case and write the file."""
        if error is None:
            self.passed.setdefault(candidate.name, []).append(f"{case.name} {case.dtype}")
        else:
            self.failed.append([case.name, case.dtype, candidate.name, error])
            print("FAILED", self.op, *self.failed[-1], flush=True)
        self.write("cut off")

    def write(self, status: str) -> None:
        """Write what is known into the file."""
        if self.path is not None:
            known = {"status": status, "passed": self.passed, "failed": self.failed}
            results.merge(self.path, results.new_run(SECTION, self.op, self.facts | known, []))

    def close(self, *, lost: bool) -> None:
        """Store the status of the whole."""
        count = len(self.failed)
        self.write(LOST if lost else f"failed: {count} case(s)" if count else "passed")


def calls(module: ModuleType, device: str, most: int | None) -> Iterator[tuple[Case, Candidate]]:
    """The small cases of an op with each backend."""
    for number, case in enumerate(module.small(device)):
        if most is not None and number >= most:
            return
        for candidate in case.candidates:
            yield case, candidate


def prove(
    device: str,
    *,
    only: str = "",
    most: int | None = None,
    path: Path | None = None,
    fresh: bool = False,
    keep_failed: bool = False,
) -> dict[str, Any]:
    """Check the small cases of the ops whose name holds a text.

    Args:
        device: "cpu" or "cuda".
        only: text in the op's name.
        most: cases of each op. None = all.
        path: result file that receives every case as it ends.
        fresh: run also what has passed before.
        keep_failed: do not run again what has failed before.

    Returns:
        ops {op: {backend: number of cases that passed}}; failed [[op, case, dtype, backend,
        error], ...]; lost: whether the device was lost on the way.
    """
    machine = Machine(device)
    passed: dict[str, dict[str, int]] = {}
    failed: list[list[str]] = []
    lost = False
    for module in ops.modules(only):
        proof = Proof(module.OP, machine, path, fresh=fresh, keep_failed=keep_failed)
        for case, candidate in calls(module, device, most):
            if proof.done(case, candidate):
                continue
            error = None
            try:
                with torch.inference_mode(not case.grad):
                    case.check(candidate)
            except Exception as found:
                error = reason(found)
            proof.add(case, candidate, error)
            lost = error is not None and not machine.alive()
            if lost:
                break
        proof.close(lost=lost)
        passed[module.OP] = {backend: len(names) for backend, names in proof.passed.items()}
        failed += [[module.OP, *row] for row in proof.failed]
        if lost:
            print(LOST, flush=True)
            break
    return {"ops": passed, "failed": failed, "lost": lost}


def main(argv: Sequence[str] | None = None) -> int:
    """Run and print; 1 if a case failed, 3 if the device was lost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", default="")
    parser.add_argument("--most", type=int)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--keep-failed", action="store_true")
    options = parser.parse_args(argv)
    found = prove(
        options.device, only=options.only, most=options.most, path=options.json,
        fresh=options.fresh, keep_failed=options.keep_failed,
    )  # fmt: skip
    print(json.dumps(found))
    return LOST_CODE if found["lost"] else int(bool(found["failed"]))


if __name__ == "__main__":
    sys.exit(main())
