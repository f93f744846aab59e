# SPDX-License-Identifier: Apache-2.0
"""`sidechain sae train`: stopped by a signal, continued, replayed."""

from __future__ import annotations

import json
import signal

import pytest
import torch

from sae.oracle import planted
from sidechain.cli import main as cli
from sidechain.sae import Sae
from sidechain.sae.training import trainer
from sidechain.sae.training.interrupt import StopRequest
from sidechain.store import ActivationWriter, Storage

STEPS = 12
LINE = f"sae train store --features 2x --k 4 --tokens {64 * STEPS} --batch 64 --set log_every=5"


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x, _ = planted(600, 32)
    with ActivationWriter("store", {"cross:1": 32}, Storage(torch.float32)) as writer:
        writer.set_grid([1.0])
        writer.write({"cross:1": x}, step=0)
    return tmp_path / "store"


@pytest.fixture
def stopped(monkeypatch):
    """Send a signal in the middle of a step."""

    def at(step, *numbers):
        real, calls = trainer.train_step, []

        def train_step(state, rows):
            found = real(state, rows)
            calls.append(state.step)
            if len(calls) == step:
                for number in numbers:
                    signal.raise_signal(number)  # to this thread: two of one kind are two
            return found

        monkeypatch.setattr(trainer, "train_step", train_step)
        return calls

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # xdist ignores it
    yield at
    signal.signal(signal.SIGINT, before)


def run(out):
    return cli.main([*LINE.split(), "--out", out])


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_a_checkpoint_first(store, stopped, capsys, number, status):
    before = signal.getsignal(number)
    assert run("whole") == 0
    calls = stopped(7, number)
    try:
        assert run("cut") == status
    except SystemExit as stop:
        assert stop.code == status
    assert len(calls) == 7
    assert (store.parent / "cut" / "checkpoints" / "step-000000007").is_dir()
    assert not (store.parent / "cut" / "sae.safetensors").exists()
    error = capsys.readouterr().err
    assert "saving a checkpoint first" in error
    assert f"7 of {STEPS} steps are saved in cut/checkpoints; the same command goes on" in error
    assert signal.getsignal(number) is before

    calls.clear()
    assert run("cut") == 0
    assert len(calls) == STEPS - 7
    one, two = (Sae.load(store.parent / out / "sae.safetensors") for out in ("whole", "cut"))
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name]), name


def test_a_second_signal_stops_at_once(store, stopped, capsys):
    stopped(7, signal.SIGINT, signal.SIGINT)
    assert run("cut") == 130
    assert not list((store.parent / "cut").glob("checkpoints/step-*"))
    assert capsys.readouterr().err.endswith("sidechain: interrupted\n")


def test_outside_of_a_run_signals_keep_their_meaning():
    before = signal.getsignal(signal.SIGINT)
    with StopRequest() as request:
        assert signal.getsignal(signal.SIGINT) is not before
        assert request.asked is None
    assert signal.getsignal(signal.SIGINT) is before


def test_a_run_is_replayed(store, capsys):
    assert run("one") == 0
    assert cli.main(["sae", "train", "--config", "one", "--out", "two"]) == 0
    one, two = (json.loads((store.parent / o / "run.json").read_text()) for o in ("one", "two"))
    assert one == two
    assert cli.main(["sae", "train", "--config", "one", "--out", "two", "--k", "5"]) == 2
    error = capsys.readouterr().err
    assert "expected k=4 [the run in two], got 5" in error.splitlines()[-1]
    kept = json.loads((store.parent / "two" / "settings.json").read_text())
    assert kept["config"]["k"] == 4


def test_a_full_disk_names_the_file(store, monkeypatch, capsys):
    from sidechain.io import tensors

    def save_file(*_):
        raise tensors.safetensors.SafetensorError(
            "I/O error: No space left on device (os error 28)"
        )

    monkeypatch.setattr(tensors.safetensors.torch, "save_file", save_file)
    assert run("one") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == "sidechain: error: No space left on device: one/sae.safetensors"
