# SPDX-License-Identifier: Apache-2.0
"""How the host's run of GPU tests is written down, judged and taken up again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gpu_host import journal, work

ROOT = Path(__file__).resolve().parents[2]
TESTS = """
import os
import pytest

def test_one(): pass
def test_two(): assert 1 == 2, "two"
@pytest.mark.skip(reason="because")
def test_three(): pass
def test_four():
    if os.environ.get("DIE"):
        os._exit(9)
"""


def run(folder: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    (folder / "test_a.py").write_text(TESTS)
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "gpu_host.journal",
        "--rootdir", str(folder), "--continue-on-collection-errors",
        "--journal", str(folder / "lines"), *arguments, str(folder),
    ]  # fmt: skip
    path = f"{ROOT / 'bench'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    # The run is no worker of the one that tests it.
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    return subprocess.run(
        command, cwd=folder, env=clean | {"PYTHONPATH": path} | env, capture_output=True,
        text=True, check=False,
    )  # fmt: skip


def outcomes(folder: Path) -> dict[str, str]:
    found = journal.read(folder / "lines")
    return {name.split("::")[-1]: entry["outcome"] for name, entry in found.items()}


class TestJournal:
    def test_every_outcome_and_its_reason(self, tmp_path: Path) -> None:
        (tmp_path / "test_b.py").write_text("import surely_absent_package\n")
        done = run(tmp_path)
        assert done.returncode == 1, done.stdout + done.stderr
        assert outcomes(tmp_path) == {
            "test_one": "passed", "test_two": "failed", "test_three": "skipped",
            "test_four": "passed", "test_b.py": "collection",
        }  # fmt: skip
        found = journal.read(tmp_path / "lines")
        assert found["test_a.py::test_two"]["why"].startswith("AssertionError: two")
        assert "No module named 'surely_absent_package'" in found["test_b.py"]["why"]

    def test_a_run_that_dies_keeps_what_was_done_and_is_taken_up(self, tmp_path: Path) -> None:
        run(tmp_path, DIE="1")
        assert outcomes(tmp_path) == {
            "test_one": "passed", "test_two": "failed", "test_three": "skipped"
        }  # fmt: skip
        (tmp_path / "passed").write_text("test_a.py::test_one\n")
        (tmp_path / "lines").unlink()
        run(tmp_path, "--passed", str(tmp_path / "passed"))
        assert set(outcomes(tmp_path)) == {"test_two", "test_three", "test_four"}

    def test_a_half_written_line_is_no_line(self, tmp_path: Path) -> None:
        path = tmp_path / "lines"
        path.write_text('{"id": "a", "outcome": "passed", "why": ""}\n{"id": "b", "outc')
        assert list(journal.read(path)) == ["a"]

    def test_a_failure_outlives_its_teardown(self, tmp_path: Path) -> None:
        path = tmp_path / "lines"
        lines = ['{"id": "a", "outcome": "failed", "why": "x"}', '{"id": "a", "outcome": "passed"}']
        path.write_text("\n".join(lines))
        assert journal.read(path)["a"]["why"] == "x"


def entry(name: str, outcome: str, why: str = "") -> dict[str, dict[str, str]]:
    return {name: {"id": name, "outcome": outcome, "why": why}}


MISSING = entry("b.py", "collection", "ModuleNotFoundError: No module named 'librosa'")
OURS = entry("b.py", "collection", "ModuleNotFoundError: No module named 'sidechain.gone'")
GOOD, BAD, SKIPPED = entry("g", "passed"), entry("f", "failed", "no"), entry("s", "skipped")


class TestJudged:
    @pytest.mark.parametrize(
        ("status", "found", "device", "expected"),
        [
            ("passed", GOOD, "cuda", "passed"),
            ("failed with exit code 1", GOOD | MISSING, "cuda", "passed"),
            ("failed with exit code 1", GOOD | OURS, "cuda", "failed: 1 test(s)"),
            ("failed with exit code 1", GOOD | BAD, "cuda", "failed: 1 test(s)"),
            ("failed with exit code 4", GOOD, "cuda", "failed with exit code 4"),
            ("passed", SKIPPED, "cuda", "failed: no test ran on the GPU"),
            ("passed", SKIPPED, "cpu", "skipped"),
            ("failed with exit code 5", {}, "cpu", "skipped"),
            ("cut off", GOOD | BAD, "cuda", "cut off"),
        ],
    )
    def test_status(self, status: str, found: dict[str, Any], device: str, expected: str) -> None:
        facts = work.judged(status, "text", found, [], SimpleNamespace(device=device))  # type: ignore[arg-type]
        assert facts["status"] == expected

    def test_what_is_taken_up(self) -> None:
        here: Any = SimpleNamespace(device="cuda")
        cut = work.judged("cut off", "", GOOD | BAD | MISSING, ["old"], here)
        assert cut["passed"] == ["old", "g"]
        assert cut["failed"] == [["f", "no"]]
        assert list(cut["not here"]) == ["b.py"]
        assert cut["counts"]["passed"] == 2
        assert work.judged("passed", "", GOOD, [], here)["passed"] == []
