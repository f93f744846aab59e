# SPDX-License-Identifier: Apache-2.0
"""`sidechain sae train`: stopped by a signal, continued, replayed."""

from __future__ import annotations

import json
import signal

import numpy as np
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


# -- own activations, other dictionaries -----------------------------------------------------------


@pytest.fixture
def acts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("acts.npy", planted(600, 32)[0].numpy())
    return tmp_path


OWN = "sae train acts.npy --features 64 --k 4 --batch 64 --set log_every=5"


def sae(*words):
    return cli.main([*OWN.split(), *words])


def test_a_file_is_trained_on_whole(acts, capsys):
    assert sae("--out", "run") == 0
    assert capsys.readouterr().out.strip() == "run/sae.safetensors"
    found = Sae.load("run/sae.safetensors")
    assert found.provenance.tokens == 9 * 64 and found.provenance.source == "acts.npy"
    assert sae("--out", "run") == 0  # finished: read
    np.save("acts.npy", planted(600, 32)[0].numpy() * 2)
    assert sae("--out", "run") == 2
    assert "expected the rows of the run in run" in capsys.readouterr().err
    assert sae("--out", "more", "--epochs", "3", "--held-out", "0.2") == 0
    more = Sae.load("more/sae.safetensors").provenance
    assert more.tokens == 3 * 7 * 64 and 0 < more.metrics["held_out_fvu"] < 1


def test_steps_and_columns(acts):
    np.save("steps.npy", np.arange(600) % 3)
    assert sae("--out", "run", "--row-steps", "steps.npy") == 0
    assert Sae.load("run/sae.safetensors").normaliser.steps.tolist() == [0, 1, 2]
    torch.save({"a": torch.zeros(600, 32), "b": planted(600, 32)[0]}, "named.pt")
    line = OWN.replace("acts.npy", "named.pt").split()
    assert cli.main([*line, "--column", "b", "--out", "column"]) == 0
    assert cli.main([*line, "--out", "none"]) == 2
    assert cli.main([*OWN.split(), "--target", "named.pt", "--out", "coder"]) == 2


def test_a_dictionary_is_gone_on_with(acts, capsys):
    assert sae("--out", "first") == 0
    capsys.readouterr()
    line = "sae train acts.npy --batch 64 --start first --out second"
    assert cli.main([*line.split(), "--k", "2"]) == 0
    second = Sae.load("second/sae.safetensors")
    assert second.config.features == 64 and second.config.k == 2
    assert second.provenance.extra["start"]["place"] == "first"
    assert cli.main([*line.split(), "--k", "3"]) == 2
    assert "or give a reason for the change" in capsys.readouterr().err
    assert cli.main([*line.split(), "--k", "3", "--reason", "two were too few"]) == 0
    assert Sae.load("second/sae.safetensors").config.k == 3
    assert cli.main(["sae", "train", "--config", "second", "--out", "third"]) == 0
    third = Sae.load("third/sae.safetensors")
    assert third.provenance.extra["start"]["place"] == "first" and third.config.k == 3


def test_bad_rows_and_finish(acts, capsys):
    x = planted(600, 32)[0]
    x[300, 3] = torch.nan
    np.save("acts.npy", x.numpy())
    assert sae("--out", "run") == 2
    assert "before step 1: " in (error := capsys.readouterr().err) and "got row 300" in error
    assert cli.main(["sae", "finish", "run"]) == 2
    assert "expected a run with a checkpoint" in capsys.readouterr().err
    assert sae("--out", "run", "--on-bad-rows", "skip") == 0
    assert Sae.load("run/sae.safetensors").provenance.extra["skipped_rows"] == 1


def test_a_stopped_run_is_finished(store, stopped, capsys):
    stopped(7, signal.SIGINT)
    assert run("cut") == 130
    capsys.readouterr()
    assert cli.main(["sae", "finish", "cut"]) == 0
    assert capsys.readouterr().out.strip() == "cut/sae.safetensors"
    assert Sae.load("cut/sae.safetensors").provenance.tokens == 7 * 64


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tokens", "6400"], "expected tokens <= 576"),
        (["--epochs", "0"], "--epochs"),
        (["--held-out", "1"], "held_out"),
        (["--held-out", "nan"], "--held-out"),
        (["--site", "cross:1"], "--site: expected a store"),
        (["--row-steps", "acts.npy"], "steps"),
        (["--row-steps", "none.npy"], "none.npy"),
        (["--column", "x"], "expected no column"),
        (["--start", "nothing"], "nothing"),
        (["--start", "acts.npy"], "acts.npy"),
        (["--on-bad-rows", "drop"], "--on-bad-rows"),
        (["--target", "none.npy"], "none.npy"),
    ],
)
def test_one_line_for_what_does_not_fit(acts, capsys, words, message):
    assert sae(*words, "--out", "run") == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and message in error[0], error
    assert not (acts / "run" / "sae.safetensors").exists()


def test_options_of_files_are_not_for_stores(store, capsys):
    assert cli.main([*LINE.split(), "--held-out", "0.1", "--out", "run"]) == 2
    assert "--held-out: expected a file or folder of own activations" in capsys.readouterr().err
