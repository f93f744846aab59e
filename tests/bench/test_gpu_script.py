# SPDX-License-Identifier: Apache-2.0
"""`bench/gpu.sh` as a whole: usage, what it needs, and all three calls rehearsed on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import sidechain
from gpu_host import plan
from sidechain.bench import results

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = ("_C.abi3.so", "_C_cuda.abi3.so")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a shell script for Linux hosts")


def call(*arguments: str, root: Path = ROOT, **env: str) -> Any:
    return subprocess.run(
        ["bash", str(root / "bench" / "gpu.sh"), *arguments],
        env=os.environ | {"PYTHON": sys.executable, "PYTHONWARNINGS": "ignore"} | env,
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy as it travels: the sources, and what was built elsewhere; empty where nothing was."""
    root = tmp_path / "tree"
    (root / "build" / "gpu").mkdir(parents=True)
    for name in ("triton_kernels", "tests", "python", "pyproject.toml"):
        (root / name).symlink_to(ROOT / name)
    (root / "bench" / "results").mkdir(parents=True)
    for name in ("gpu.sh", "gpu_host"):
        (root / "bench" / name).symlink_to(ROOT / "bench" / name)
    for name in LIBRARIES:
        built = Path(sidechain.__file__).parent / name
        (root / "build" / "gpu" / name).write_bytes(built.read_bytes() if built.exists() else b"")
    (root / "build" / "gpu" / "COMMIT").write_text("abc1234")
    return root


def test_usage() -> None:
    done = call()
    assert done.returncode == 2
    assert "gpu.sh build" in done.stdout
    assert "torch >= 2.11" in done.stdout


def test_plan() -> None:
    done = call("plan")
    assert done.stdout.strip() == plan.text(), done.stderr


def test_what_was_not_built_is_asked_for(tree: Path) -> None:
    (tree / "build" / "gpu" / LIBRARIES[1]).unlink()
    done = call("run", "1", "--device", "cpu", root=tree)
    assert done.returncode == 2
    assert "expected build/gpu/_C_cuda.abi3.so, got none: run 'bench/gpu.sh build'" in done.stderr


def test_a_call_leaves_its_results_and_nothing_else(tree: Path, tmp_path: Path) -> None:
    before = {p.name for p in tmp_path.iterdir()}
    done = call(
        "run", "sanitizer", "--device", "cpu", root=tree, OUT=str(tmp_path / "o"),
        TMPDIR=str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert {p.name for p in tmp_path.iterdir()} == before | {"o"}
    (path,) = (tmp_path / "o").iterdir()
    # A machine that has results of its own keeps them beside the new ones.
    runs = [run for run in results.read(path) if run["section"] == "sanitizer"]
    assert {run["commit"] for run in runs} == {"abc1234"}
    assert {run["status"] for run in runs} == {"skipped"}
    assert "now: bring the result file home" in done.stdout


@pytest.mark.slow
def test_rehearsal(tree: Path) -> None:
    """Every unit of all calls on tiny shapes: a typing error is not met on the GPU first."""
    done = call("rehearse", "--short", root=tree)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "rehearsal: every unit is in the file"
    for number in plan.CALLS:
        assert f"\ncall {number}: " in done.stdout
