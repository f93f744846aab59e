# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sidechain.bench import demo
from sidechain.bench.machine import Machine
from sidechain.studies.demo import page
from sidechain.studies.demo import run as study
from sidechain.studies.demo.config import SHORT


def test_stages_and_the_whole_with_its_report(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    seen: list[Any] = []

    def run(out: Path, config: Any) -> Any:
        clock[0] += 5.0
        seen.append((out, config))
        return SimpleNamespace(seconds={"localization": 3.0, "sweeps": 2.0})

    def write(found: Any, path: Path) -> None:
        clock[0] += 2.0
        assert path.parent.is_dir()

    monkeypatch.setattr(demo.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(study, "run", run)
    monkeypatch.setattr(page, "write", write)
    (rows,) = demo.rows(Machine("cpu"), quick=True)
    assert {row.case: row.median_us for row in rows} == {
        "localization": 3e6,
        "sweeps": 2e6,
        demo.WHOLE: 7e6,
    }
    ((out, config),) = seen
    assert config == SHORT
    assert not out.exists()


def test_it_has_no_parts() -> None:
    with pytest.raises(ValueError, match="expected no part of demo, got 'x'"):
        next(demo.rows(Machine("cpu"), only="x"))
