# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: one process at a time, and nothing left of the one that died."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import torch

from sidechain.cli import main as cli
from sidechain.sae import Sae, train
from sidechain.sae.training import folder
from sidechain.sae.training.step import train_step
from sidechain.store import ActivationWriter

SHORT = dict(features=16, k=2, tokens=64 * 8, batch=64, log_every=2, progress=False)


def rows():
    return [torch.randn(2048, 6, generator=torch.Generator().manual_seed(3))]


def content(out):
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()}


def holder(out):
    """A process that holds the lock of a run until its input ends."""
    code = """
        import sys
        from pathlib import Path
        from sidechain.io.lock import Lock
        lock = Lock(Path(sys.argv[1]), "test")
        print("held", flush=True)
        sys.stdin.read()
    """
    out.mkdir(exist_ok=True)
    line = [sys.executable, "-c", textwrap.dedent(code), str(out / folder.LOCK)]
    held = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert held.stdout.readline() == "held\n"
    return held


def test_a_second_process_is_refused_before_it_writes(tmp_path):
    out = tmp_path / "run"
    held = holder(out)
    try:
        before = content(out)
        message = rf"Trainer: expected a folder that no other process .* pid {held.pid} on .* since"
        with pytest.raises(RuntimeError, match=message):
            train(rows(), out, **SHORT)
        assert content(out) == before
    finally:
        held.kill()
        held.communicate()
    assert (out / folder.LOCK).exists()  # killed, and yet not stale
    train(rows(), out, **SHORT)


def test_a_second_command_is_one_line(tmp_path, capsys):
    with ActivationWriter(tmp_path / "store", {"cross:1": 6}) as writer:
        writer.write({"cross:1": rows()[0]})
    held = holder(tmp_path / "run")
    try:
        line = ["sae", "train", tmp_path / "store", "--tokens", "128", "--batch", "64"]
        line += ["--features", "16", "--k", "2", "--out", tmp_path / "run"]
        before = content(tmp_path / "run")
        assert cli.main([str(part) for part in line]) == 2
        assert content(tmp_path / "run") == before
    finally:
        held.kill()
        held.communicate()
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert said.startswith("sidechain: error: Trainer: expected a folder that no other process")


def test_a_second_training_of_one_process_is_refused(tmp_path, monkeypatch):
    tried = []

    def step(state, batch):
        if state.step == 3 and not tried:
            tried.append(1)
            with pytest.raises(RuntimeError, match=rf"locked by pid {os.getpid()} on"):
                train(rows(), tmp_path / "run", **SHORT)
            train(rows(), tmp_path / "other", **SHORT)
        return train_step(state, batch)

    monkeypatch.setattr("sidechain.sae.training.trainer.train_step", step)
    train(rows(), tmp_path / "run", **SHORT)
    assert tried


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_the_lock_goes_with_an_error(tmp_path, error, monkeypatch):
    def fail(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("sidechain.sae.training.trainer.train_step", fail)
        with pytest.raises(error) as kept:  # holds the frames, and with them the trainer
            train(rows(), tmp_path / "run", **SHORT)
    train(rows(), tmp_path / "run", **SHORT)
    assert kept.value is not None


def test_a_finished_run_is_only_read(tmp_path):
    made = train(rows(), tmp_path / "run", **SHORT)
    held = holder(tmp_path / "run")
    try:
        before = content(tmp_path / "run")
        again = train(rows(), tmp_path / "run", **SHORT)
        assert content(tmp_path / "run") == before
    finally:
        held.kill()
        held.communicate()
    assert torch.equal(made.w_dec, again.w_dec)


def test_left_overs_are_removed_and_nothing_else(tmp_path):
    out = tmp_path / "run"
    ours = [
        "checkpoints/.step-000000400.part/features-00000-of-00001.safetensors",
        "checkpoints/.step-000000400.part/.manifest.json.abcd_123.part",
        ".sae.safetensors.abcd1234.part",
        ".run.json.x_yzx_yz.part",
        ".metrics.jsonl.00000000.part",
        ".settings.json.abcdefgh.part",
    ]
    theirs = [
        ".notes.txt.abcd1234.part",
        ".sae.safetensors.part",
        "sae.safetensors.abcd1234.part",
        ".run.json.ABCD1234.part",
        "checkpoints/notes.part",
        "checkpoints/.step-x.part/file",
        "notes/.run.json.abcd1234.part",
    ]
    for name in ours + theirs:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(b"x")
    train(rows(), out, **SHORT)
    left = content(out).keys()
    assert not left & set(ours) and set(theirs) <= left
    assert not (out / "checkpoints/.step-000000400.part").exists()
    Sae.load(out / "sae.safetensors")


def test_a_kill_in_the_middle_of_a_save_leaves_nothing(tmp_path):
    """A process that dies at the rename of its second checkpoint."""
    out, child = tmp_path / "run", os.fork()
    if child == 0:
        try:
            real, calls = os.replace, []

            def replace(source, target):
                calls.append(str(target))
                if len([c for c in calls if "step-" in os.path.basename(c)]) == 2:
                    os._exit(9)
                real(source, target)

            os.replace = replace
            train(rows(), out, **SHORT, checkpoint_minutes=0.0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert list((out / "checkpoints").glob(".step-*.part"))
    train(rows(), out, **SHORT, checkpoint_minutes=0.0)
    assert not [name for name in content(out) if ".part" in name]
