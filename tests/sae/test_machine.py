# SPDX-License-Identifier: Apache-2.0
"""Where other arithmetic goes on with a run, a note says that its bits may differ."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from sidechain import _native
from sidechain.sae import Sae, train
from sidechain.sae.training.machine import machine
from sidechain.sae.training.step import train_step

SHORT = dict(
    features=16, k=2, tokens=64 * 12, batch=64, log_every=2, progress=False,
    checkpoint_minutes=0.0,
)  # fmt: skip


def rows():
    return [torch.randn(2048, 6, generator=torch.Generator().manual_seed(3))]


@pytest.fixture
def cut_off(tmp_path, monkeypatch):
    """A run with a checkpoint at step 6; its folder and that of the whole run."""

    def cut(state, batch):
        if state.step == 7:
            raise InterruptedError
        return train_step(state, batch)

    train(rows(), tmp_path / "whole", **SHORT)
    with monkeypatch.context() as patch:
        patch.setattr("sidechain.sae.training.trainer.train_step", cut)
        with pytest.raises(InterruptedError):
            train(rows(), tmp_path / "cut", **SHORT)
    return tmp_path / "cut", tmp_path / "whole"


def manifest(out):
    return max((out / "checkpoints").iterdir()) / "manifest.json"


def test_a_checkpoint_knows_what_wrote_it(cut_off, capsys):
    known = json.loads(manifest(cut_off[0]).read_text())["machine"]
    assert known == machine(torch.device("cpu"))
    assert set(known) == {"instructions", "threads", "torch", "device"}
    assert known["torch"] == torch.__version__ and known["device"] == "cpu"
    train(rows(), cut_off[0], **SHORT)
    assert "bit for bit" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value"),
    [("instructions", "AVX1, none"), ("threads", 999), ("torch", "1.0"), ("device", "cuda, X")],
)
def test_another_one_is_a_note(cut_off, capsys, name, value):
    out, _ = cut_off
    content = json.loads(manifest(out).read_text())
    content["machine"][name] = value
    manifest(out).write_text(json.dumps(content))
    train(rows(), out, **SHORT)
    (note,) = [line for line in capsys.readouterr().err.splitlines() if "note" in line]
    assert f"step 6 was written with {name} {value}, now " in note
    assert note.endswith("equal up to rounding, not bit for bit")
    left, right = (Sae.load(folder / "sae.safetensors") for folder in cut_off)
    assert torch.equal(left.w_dec, right.w_dec)


@pytest.mark.parametrize("known", [None, [], "x", {}, {"cores": 3}])
def test_older_checkpoints_say_nothing(cut_off, capsys, known):
    content = json.loads(manifest(cut_off[0]).read_text())
    content["machine"] = known
    manifest(cut_off[0]).write_text(json.dumps(content))
    train(rows(), cut_off[0], **SHORT)
    assert "bit for bit" not in capsys.readouterr().err


@pytest.mark.skipif(
    _native.host() is None or _native.host().best_isa() == "baseline", reason="one instruction set"
)
def test_another_instruction_set_is_seen():
    code = (
        "import torch; from sidechain.sae.training.machine import machine; "
        "print(machine(torch.device('cpu'))['instructions'])"
    )
    found = []
    for more in ({}, {"SIDECHAIN_ISA": "baseline"}, {"ATEN_CPU_CAPABILITY": "default"}):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, **more},
            capture_output=True,
            check=True,
        )
        found.append(done.stdout)
    assert len(set(found)) == 3
