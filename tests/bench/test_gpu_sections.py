# SPDX-License-Identifier: Apache-2.0
"""What `bench/gpu.sh run` does on a GPU host, tried without one."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sidechain.bench import results

ROOT = Path(__file__).resolve().parents[2]
_spec = importlib.util.spec_from_file_location("gpu_sections", ROOT / "bench" / "gpu_sections.py")
assert _spec is not None
assert _spec.loader is not None
gpu = importlib.util.module_from_spec(_spec)
sys.modules["gpu_sections"] = gpu
_spec.loader.exec_module(gpu)

# What a GPU host need not have. The test runs with these hidden.
MISSING = (
    "diffusers", "transformers", "tokenizers", "peft", "librosa", "soundfile", "matplotlib",
    "pandas", "scipy", "jinja2", "hypothesis", "pytest_benchmark", "tqdm", "safetensors",
)  # fmt: skip
HIDE = f"""
import sys
from importlib.machinery import PathFinder
class Hiding:
    @staticmethod
    def find_spec(name, path=None, target=None):
        hidden = name.split(".")[0] in {MISSING!r}
        return None if hidden else PathFinder.find_spec(name, path, target)
sys.meta_path = [Hiding if finder is PathFinder else finder for finder in sys.meta_path]
"""


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "committed")
    monkeypatch.setattr(results, "commit", lambda: "abc")
    return gpu.Session("cpu", tmp_path / "out", 100.0)


class Work:
    """Units that count how often they ran."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.status = {"b": "failed with exit code 1"}

    def unit(self, op: str) -> Any:
        def work(session: Any, unit: Any, limit: float) -> dict[str, Any]:
            self.ran.append(unit.op)
            return {"status": self.status.get(unit.op, "passed"), "limit": limit}

        return gpu.Unit("correctness", op, 30.0, work)


class TestResume:
    def test_failed_units_run_again_and_good_ones_do_not(self, session: Any) -> None:
        work = Work()
        units = [work.unit(op) for op in "abc"]
        assert gpu.run(session, units) == 1
        work.status = {}
        assert gpu.run(session, units) == 0
        assert work.ran == ["a", "b", "c", "b"]
        session.again = True
        assert gpu.run(session, units[:1]) == 0
        assert work.ran[-1] == "a"

    def test_another_commit_runs_everything(
        self, session: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        work = Work()
        gpu.run(session, [work.unit("a")])
        monkeypatch.setattr(results, "commit", lambda: "def")
        session.commit = "def"
        gpu.run(session, [work.unit("a")])
        assert work.ran == ["a", "a"]
        assert [r["commit"] for r in results.read(session.path)] == ["def"]

    def test_nothing_starts_when_the_time_is_spent(self, session: Any) -> None:
        work = Work()
        session.until = gpu.time.monotonic() + 4
        assert gpu.run(session, [work.unit("a"), work.unit("c")]) == 2
        assert work.ran == []

    def test_no_unit_gets_more_than_what_is_left(self, session: Any) -> None:
        session.until = gpu.time.monotonic() + 20
        gpu.run(session, [Work().unit("a")])
        (run,) = results.read(session.path)
        assert 10 < run["limit"] <= 20

    def test_committed_results_are_the_base(
        self, session: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        gpu.run(session, [Work().unit("a")])
        monkeypatch.setattr(gpu, "RESULTS", session.path.parent)
        other = gpu.Session("cpu", tmp_path / "elsewhere", 100.0)
        assert other.done(Work().unit("a"))
        assert results.read(other.path) == results.read(session.path)


class TestSections:
    def test_a_hanging_command_is_cut_off(self, session: Any) -> None:
        command = [sys.executable, "-u", "-c", "print('begun'); import time; time.sleep(60)"]
        status, text = session.process(command, 3.0)
        assert status == "cut off"
        assert "begun" in text

    def test_a_failing_command_keeps_its_words(self, session: Any) -> None:
        status, text = session.process([sys.executable, "-c", "raise SystemExit('why')"], 30.0)
        assert status == "failed with exit code 1"
        assert "why" in text

    def test_every_section_is_listed(self) -> None:
        named = (ROOT / "bench" / "gpu.sh").read_text()
        for unit in gpu.units():
            assert unit.section in named

    def test_unknown_section(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as stop:
            gpu.main(["nonsense"])
        assert stop.value.code == 2
        assert "expected sections of correctness" in capsys.readouterr().err


def test_the_proof_runs_without_the_packages(tmp_path: Path) -> None:
    """The case table passes with torch alone; a failure would be in the last line."""
    (tmp_path / "sitecustomize.py").write_text(HIDE)
    path = f"{tmp_path}{os.pathsep}{Path(results.__file__).parents[2]}"
    command = [sys.executable, "-m", "sidechain.bench.small", "--most", "2"]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["failed"] == []
    assert all(sum(counts.values()) >= 2 for counts in found["ops"].values())


@pytest.mark.skipif(sys.platform != "linux", reason="a shell script for Linux hosts")
class TestScript:
    def call(self, *arguments: str, root: Path = ROOT, **env: str) -> Any:
        return subprocess.run(
            ["bash", str(root / "bench" / "gpu.sh"), *arguments],
            env=os.environ | {"PYTHON": sys.executable} | env,
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    def test_usage(self) -> None:
        done = self.call()
        assert done.returncode == 2
        assert "gpu.sh build" in done.stdout

    def test_a_dry_run_leaves_only_its_results(self, tmp_path: Path) -> None:
        """With libraries that stand for the built ones: the reference runs, nothing is left."""
        tree = tmp_path / "tree"
        (tree / "build" / "gpu").mkdir(parents=True)
        for name in ("bench", "triton_kernels", "tests", "python", "pyproject.toml"):
            (tree / name).symlink_to(ROOT / name)
        done = self.call("run", "sanitizer", "--device", "cpu", root=tree, OUT=str(tmp_path / "o"))
        assert done.returncode == 2
        assert "expected build/gpu/_C.abi3.so" in done.stderr
        for name in ("_C.abi3.so", "_C_cuda.abi3.so"):
            (tree / "build" / "gpu" / name).write_bytes(b"")
        (tree / "build" / "gpu" / "COMMIT").write_text("abc1234")
        before = {p.name for p in Path(tmp_path).iterdir()}
        done = self.call(
            "run", "sanitizer", "--device", "cpu", root=tree, OUT=str(tmp_path / "o"),
            TMPDIR=str(tmp_path), PYTHONWARNINGS="ignore",
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        assert {p.name for p in Path(tmp_path).iterdir()} == before | {"o"}
        (path,) = (tmp_path / "o").iterdir()
        runs = results.read(path)
        assert {r["commit"] for r in runs} == {"abc1234"}
        assert {(r["section"], r["status"]) for r in runs} == {("sanitizer", "skipped")}
