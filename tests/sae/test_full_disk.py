# SPDX-License-Identifier: Apache-2.0
"""A disk that is full at any write of a run: one line, and the run goes on bit for bit."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
NAMED = re.compile(
    r"|run\.(json|lock)|settings\.json|metrics\.jsonl|sae\.safetensors|checkpoints"
    r"|checkpoints/\.?step-\d{9}(\.part)?(/(manifest\.json|features-00000-of-00001\.safetensors))?"
)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs a C compiler and LD_PRELOAD")
    made = tmp_path_factory.mktemp("full") / "full_disk.so"
    line = [compiler, "-shared", "-fPIC", "-O1", "-o", made, HERE / "full_disk.c", "-ldl"]
    subprocess.run(line, check=True, capture_output=True)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["once", "always"])
def test_every_write_of_a_run(tmp_path, library, mode):
    done = subprocess.run(
        [sys.executable, HERE / "full_disk_worker.py", tmp_path, library, mode],
        env={**os.environ, "LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    *rows, last = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["wrong"] for row in rows if "wrong" in row] == []
    named = {row["named"] for row in rows}
    assert all(NAMED.fullmatch(name) for name in named), named
    # Every kind of file was hit.
    kinds = ("run.lock", "run.json", "settings.json", "metrics.jsonl", "sae.safetensors")
    assert set(kinds) <= named
    assert any(name.endswith("manifest.json") for name in named)
    assert any("features-" in name for name in named)
    assert last["calls"] == len(rows) > 50
