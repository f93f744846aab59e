# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin: one line for every test as soon as it has ended.

`-p gpu_host.journal --journal FILE` appends JSON lines; `--passed FILE` holds the ids of tests that
need not run again. A run that is cut off keeps all that was done.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--journal", type=Path, help="append the outcome of every test to this file")
    parser.addoption("--passed", type=Path, help="a file of test ids that are not run again")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--journal")
    if path is not None and "PYTEST_XDIST_WORKER" not in os.environ:
        config.pluginmanager.register(Journal(path), "gpu_host_journal")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    path = config.getoption("--passed")
    if path is None:
        return
    passed = set(path.read_text().splitlines())
    gone = [item for item in items if item.nodeid in passed]
    if gone:
        items[:] = [item for item in items if item.nodeid not in passed]
        config.hook.pytest_deselected(items=gone)


class Journal:
    """Writes lines with `id`, `outcome` (passed, failed, skipped, collection) and `why`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seen: set[str] = set()

    def _write(self, name: str, outcome: str, why: str) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps({"id": name, "outcome": outcome, "why": why[:300]}) + "\n")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed or report.skipped:
            self._write(report.nodeid, report.outcome, _last(report.longrepr))
        elif report.when == "call":
            self._write(report.nodeid, "passed", "")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        # Every worker of xdist reports the same.
        if report.failed and report.nodeid not in self.seen:
            self.seen.add(report.nodeid)
            self._write(report.nodeid, "collection", _last(report.longrepr))


def _last(found: Any) -> str:
    """Return the line that gives the reason."""
    if isinstance(found, tuple):
        return str(found[-1])
    lines = [line for line in str(found).splitlines() if line.strip()]
    errors = [line[1:].strip() for line in lines if line.startswith("E ")]
    return errors[0] if errors else lines[-1] if lines else ""


def read(path: Path) -> dict[str, dict[str, str]]:
    """Return the last line of each test; a half-written line is ignored."""
    found = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        # A failed test stays failed, whatever its teardown reports.
        if found.get(entry["id"], {}).get("outcome") != "failed":
            found[entry["id"]] = entry
    return found
