# SPDX-License-Identifier: Apache-2.0
"""The work of the units of the plan. Each returns its status; the file has the rest."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from sidechain.bench.run import LOST_CODE

from . import journal
from .session import CUT, ROOT, Session

SANITIZER = "compute-sanitizer"
WORKERS = 8
LINES = 25
SMALL = 12  # cases of each op under a sanitizer, which is some 50 times slower
SHORT_TESTS = "tests/triton/test_gpu.py"
MISSING = re.compile(r"No module named '(\w+)")


def machine(session: Session, section: str, op: str | None, limit: float) -> str:
    """Measure the limits of the card and read its state."""
    arguments = ["--device", session.device, *(["--quick"] if session.quick else [])]
    status, text = session.module("sidechain.bench.machine", arguments, limit)
    facts = last_json(text)
    return session.store(section, op, facts | {"status": status, "log": log_of(status, text)})


def warm(session: Session, section: str, op: str | None, limit: float) -> str:
    """Compile the Triton kernels of some ops on all cores."""
    if session.device == "cpu":
        why = "Triton has no kernels for a CPU"
        return session.store(section, op, {"status": "skipped", "log": [why]})
    found, status = [], "passed"
    stop = time.monotonic() + limit
    for name in op.split("+") if op else [""]:
        arguments = ["--device", session.device, "--only", name]
        ended, text = session.module("sidechain.bench.warm", arguments, stop - time.monotonic())
        found.append(f"{name}: {tail(text, 1)[0] if text.strip() else ended}")
        status = ended if ended != "passed" else status
    return session.store(section, op, {"status": status, "log": found})


def correctness(session: Session, section: str, op: str | None, limit: float) -> str:
    """Check the cases of an op on every backend, also after the device was lost."""
    arguments = ["--device", session.device, "--only", op or "", "--json", str(session.path)]
    arguments += ["--most", "2"] if session.quick else []
    first = ["--fresh"] if session.again else []
    return _until_done(session, "sidechain.bench.small", arguments, first, section, op, limit)


def bench(session: Session, section: str, op: str | None, limit: float) -> str:
    """Run the command `bench`, which stores its rows itself."""
    if section in ("hooks", "sharing", "generation") and not importlib.util.find_spec("diffusers"):
        return session.store(section, op, {"status": "skipped", "log": ["diffusers is not here"]})
    arguments = ["bench", section, "--device", session.device, "--json", str(session.path)]
    arguments += ["--only", op or "", "--seconds", "0.01" if session.quick else "0.25"]
    arguments += ["--quick"] if session.quick else []
    arguments += ["--threads", "1"] if session.device == "cpu" else []
    first = ["--fresh"] if session.again else []
    return _until_done(session, "sidechain", arguments, first, section, op, limit)


def _until_done(
    session: Session, module: str, arguments: list[str], first: list[str], section: str,
    op: str | None, limit: float,
) -> str:  # fmt: skip
    """Run a module that stores its rows; run it again after each case that broke the device."""
    stop = time.monotonic() + limit
    status, text = session.module(module, [*arguments, *first], limit)
    while status == f"failed with exit code {LOST_CODE}" and stop - time.monotonic() > 5:
        before = session.stored(section, op)
        again = [*arguments, "--keep-failed"]
        status, more = session.module(module, again, stop - time.monotonic())
        text += more
        if session.stored(section, op) == before:
            break  # no progress
    print(text, end="", flush=True)
    run = session.stored(section, op)
    known = run.get("status", status) if run is not None else status
    if status == "passed":
        return str(known)
    # A process that died otherwise left the status "cut off" and the rows it had finished.
    worst = known if known.startswith("failed") else status
    return session.store(section, op, {"status": worst, "log": tail(text)})


def tests(session: Session, section: str, op: str | None, limit: float) -> str:
    """Run all tests that pytest marks as needing a GPU, by several workers."""
    with tempfile.TemporaryDirectory() as place:
        lines, passed = Path(place, "journal"), Path(place, "passed")
        before = session.stored(section, op) or {}
        known = [] if session.again else list(before.get("passed", []))
        passed.write_text("\n".join(known))
        arguments = [
            "-q", "-p", "no:cacheprovider", "-p", "gpu_host.journal", "-m", "gpu",
            "--continue-on-collection-errors", "--journal", str(lines), "--passed", str(passed),
            SHORT_TESTS if session.short else "tests",
        ]  # fmt: skip
        if importlib.util.find_spec("xdist") and not session.short:
            arguments += ["-n", str(WORKERS if session.device == "cuda" else 2)]
        if importlib.util.find_spec("pytest_timeout"):
            arguments += ["--timeout", "100"]
        status, text = session.module("pytest", arguments, limit)
        return session.store(section, op, judged(status, text, journal.read(lines), known, session))


def judged(
    status: str, text: str, found: dict[str, dict[str, str]], known: list[str], session: Session
) -> dict[str, Any]:
    """Return the facts of a run of tests.

    Args:
        status: of the process.
        text: what it printed.
        found: outcome of every test that ended, as in `journal.read`.
        known: tests that had passed before.
        session: of the call.

    Returns:
        `counts`; `failed` [[test, why]]; `not here`, files that need a package the host lacks;
        `passed`, all ids, where the run is incomplete and has to continue from there.
    """
    counts = Counter(entry["outcome"] for entry in found.values())
    lacks = {
        name: entry["why"]
        for name, entry in found.items()
        if entry["outcome"] == "collection" and _is_missing(entry["why"])
    }
    bad = [
        [name, entry["why"]]
        for name, entry in found.items()
        if entry["outcome"] in ("failed", "collection") and name not in lacks
    ]
    ran = len(known) + counts["passed"]
    if status != CUT:
        # 1: failures, also of collecting files whose packages are missing; 5: nothing was selected.
        expected = status in ("passed", "failed with exit code 1", "failed with exit code 5")
        if bad:
            status = f"failed: {len(bad)} test(s)"
        elif expected:
            status = "passed" if ran else "skipped"
        if session.device == "cuda" and status == "skipped":
            status = "failed: no test ran on the GPU"
    facts: dict[str, Any] = {
        "status": status, "counts": {"passed": ran, "skipped": counts["skipped"]},
        "failed": bad, "not here": lacks, "log": log_of(status, text), "passed": [],
    }  # fmt: skip
    if status not in ("passed", "skipped"):
        facts["passed"] = [*known, *(n for n, e in found.items() if e["outcome"] == "passed")]
    return facts


def _is_missing(why: str) -> bool:
    """Whether a file could not be imported because another package is not installed."""
    name = MISSING.search(why)
    return name is not None and name.group(1) != "sidechain"


def kernel_names() -> list[str]:
    """Parts of mangled names: one for all of our kernels in CUDA C++, one for each in Triton."""
    names = set()
    for file in sorted((ROOT / "triton_kernels").glob("*.py")):
        names |= set(re.findall(r"^def (\w+_kernel)\(", file.read_text(), re.MULTILINE))
    return ["9sidechain4cuda", *sorted(names)]


def sanitizer(session: Session, section: str, op: str | None, limit: float) -> str:
    """Run the small cases of all ops under one tool that watches our kernels only."""
    tool = shutil.which(SANITIZER) or shutil.which(f"/usr/local/cuda/bin/{SANITIZER}")
    if tool is None or session.device == "cpu":
        why = f"{SANITIZER} is not here" if tool is None else "there is no GPU"
        return session.store(section, op, {"status": "skipped", "log": [why]})
    filters = [word for name in kernel_names() for word in ("--kernel-name", f"kns={name}")]
    command = [
        # Without torch's cache every tensor is its own allocation, so overruns are seen.
        "env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1",
        tool, "--tool", op or "memcheck", "--error-exitcode", "99", *filters, sys.executable,
        "-m", "sidechain.bench.small", "--device", "cuda", "--most", str(SMALL),
    ]  # fmt: skip
    status, text = session.process(command, limit)
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", text)
    if status == "passed" and not summary:
        status = "failed: the tool printed no summary"
    return session.store(
        section, op, {"status": status, "summary": summary[-1:], "log": log_of(status, text)}
    )


def last_json(text: str) -> dict[str, Any]:
    """Return the last line that is a JSON object."""
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            found: dict[str, Any] = json.loads(line)
            return found
    return {}


def tail(text: str, lines: int = LINES) -> list[str]:
    """Return the last lines, each cut to a length that suits a result file."""
    return [line[:300] for line in text.splitlines()[-lines:]]


def log_of(status: str, text: str) -> list[str]:
    """Return the output to keep: none where the status is good."""
    return [] if status in ("passed", "skipped") else tail(text)
