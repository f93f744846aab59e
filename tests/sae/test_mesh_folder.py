# SPDX-License-Identifier: Apache-2.0
"""Trouble of one process of a mesh is that of all: none of them waits without an end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sidechain.sae import Sae


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """The folder in which two processes left what they raised."""
    place = tmp_path_factory.mktemp("mesh")
    worker = Path(__file__).with_name("mesh_folder_worker.py")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        str(worker), str(place),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr[-4000:]
    return place


def raised(place, name):
    return [(place / f"{name}.{rank}").read_text() for rank in (0, 1)]


@pytest.mark.slow
def test_a_locked_folder(left):
    first, second = raised(left, "locked")
    assert first.startswith("RuntimeError: Trainer: expected a folder that no other process trains")
    assert second.startswith("RuntimeError: Trainer: expected the first process to open")
    assert raised(left, "free") == ["nothing", "nothing"]


@pytest.mark.slow
def test_a_disk_that_is_full_for_one_of_them(left):
    for text in raised(left, "full"):
        assert text.startswith("OSError: [Errno 28] No space left on device")
    assert raised(left, "goes-on") == ["nothing", "nothing"]
    whole, cut = (Sae.load(left / p / "sae.safetensors") for p in ("locked", "full"))
    assert torch.equal(whole.w_dec, cut.w_dec)
    assert not list(left.rglob("*.part"))
