# SPDX-License-Identifier: Apache-2.0
"""Loggers: a run of its own each, closed at its end, and no reason to stop a training."""

from __future__ import annotations

import math
import re
import sys
import types
import warnings
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from sidechain.sae import train
from sidechain.sae.training.loggers import Loggers, run_name
from sidechain.sae.training.step import train_step

SHORT = dict(
    features=16, k=2, tokens=64 * 12, batch=64, log_every=2, progress=False, loggers=["wandb"],
    checkpoint_minutes=0.0,
)  # fmt: skip


def rows():
    return [torch.randn(2048, 6, generator=torch.Generator().manual_seed(3))]


class UsageError(Exception):
    """As wandb calls a missing key."""


class FakeRun:
    def __init__(self, owner, id, name):
        self.owner, self.id, self.name = owner, id, name
        self.logged, self.exit_code, self.last = [], None, -1

    def log(self, values, step):
        if self.owner.broken == "log":
            raise ConnectionError("no network\nat all")
        assert self.exit_code is None, "wandb refuses a run that is finished"
        if step < self.last:
            return  # wandb drops steps of the past, with a warning of its own
        self.last = step
        self.logged.append((step, dict(values)))

    def finish(self, exit_code=None):
        if self.owner.broken == "finish":
            raise TimeoutError("no answer")
        self.exit_code = exit_code


class FakeWandB(types.ModuleType):
    """What `wandb` 0.2x does: one global run unless asked for others, checks of id and name."""

    def __init__(self):
        super().__init__("wandb")
        self.runs, self.stored, self.broken = [], {}, ""

    def init(self, *, dir, config, id, name, resume, reinit):
        if self.broken == "init":
            raise UsageError(
                "api_key not configured (no-tty). call wandb.login(key=[your_api_key])"
            )
        open_runs = [run for run in self.runs if run.exit_code is None]
        if open_runs and reinit != "create_new":
            return open_runs[-1]
        if not 1 <= len(id) <= 128 or re.search(r"[/\\#?%:]", id):
            raise UsageError(f"Invalid Run ID: {id}")
        if len(name) > 128:
            raise UsageError("name is too long")
        assert resume == "allow" and dir.startswith("/")
        run = FakeRun(self, id, name)
        if id in self.stored:
            run.last = self.stored[id].last
        self.stored[id] = run
        self.runs.append(run)
        return run


@pytest.fixture
def wandb(monkeypatch):
    made = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", made)
    return made


def test_each_training_has_its_run_and_closes_it(tmp_path, wandb):
    users_own = wandb.init(dir="/", config={}, id="mine", name="mine", resume="allow", reinit=None)
    for part in ("a/x", "b/x"):
        train(rows(), tmp_path / part, **SHORT)
    mine, first, second = wandb.runs
    assert mine is users_own and mine.exit_code is None and not mine.logged
    assert len({first.id, second.id, mine.id}) == 3
    assert (first.name, second.name) == ("a/x", "b/x")
    for run in (first, second):
        assert run.exit_code == 0
        assert [step for step, _ in run.logged] == [2, 4, 6, 8, 10, 12]
        assert {"fvu", "l0", "dead", "tokens_per_s"} <= run.logged[0][1].keys()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_training_that_fails_closes_its_run_and_resumes_it(tmp_path, wandb, error, monkeypatch):
    def cut(state, batch):
        if state.step == 7:
            raise error
        return train_step(state, batch)

    with monkeypatch.context() as patch:
        patch.setattr("sidechain.sae.training.trainer.train_step", cut)
        with pytest.raises(error):
            train(rows(), tmp_path, **SHORT)
    assert wandb.runs[0].exit_code == 1
    train(rows(), tmp_path, **SHORT)
    first, second = wandb.runs
    assert first.id == second.id and second.exit_code == 0
    steps = [step for run in (first, second) for step, _ in run.logged]
    assert sorted(set(steps)) == [2, 4, 6, 8, 10, 12] and len(steps) == 6


@pytest.mark.parametrize("broken", ["init", "log", "finish"])
def test_a_logger_that_fails_is_one_warning(tmp_path, wandb, broken):
    plain = train(rows(), tmp_path / "plain", **{**SHORT, "loggers": []})
    wandb.broken = broken
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        sae = train(rows(), tmp_path / "run", **SHORT)
    assert len(found) == 1
    text = str(found[0].message)
    assert text.startswith("wandb: expected to") and "training goes on without it" in text
    assert "\n" not in text
    assert torch.equal(plain.w_dec, sae.w_dec)


def test_one_that_is_not_installed_is_a_note(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    train(rows(), tmp_path, **SHORT)
    assert "sidechain: note: no wandb: " in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "[]", '{"id": 3}', '{"id": "a/b"}', '{"id": ""}', "{}"])
def test_a_damaged_id_is_drawn_again(tmp_path, wandb, text):
    (tmp_path / "wandb.json").write_text(text)
    Loggers(["wandb"], tmp_path, {}, 0).close(failed=False)
    Loggers(["wandb"], tmp_path, {}, 0).close(failed=False)
    assert len(wandb.stored) == 1 and len(wandb.runs) == 2


def test_an_id_that_cannot_be_kept_is_a_warning(tmp_path, wandb, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "wandb.json")

    monkeypatch.setattr("sidechain.sae.training.loggers.write_json", full)
    with pytest.warns(RuntimeWarning, match="No space left on device"):
        Loggers(["wandb"], tmp_path, {}, 0)


def test_the_same_name_twice_is_one_run(tmp_path, wandb):
    Loggers(["wandb", "wandb"], tmp_path, {}, 0).close(failed=False)
    assert len(wandb.runs) == 1


@pytest.mark.parametrize("name", ["x" * 200, "a b", "ä#?%:\\*", "-", "k=32\nlr=1"])
def test_names_are_safe(tmp_path, wandb, name):
    folder = tmp_path / "deep" / name
    folder.mkdir(parents=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Loggers(["wandb"], folder, {"path": folder}, 0).close(failed=False)
    text = run_name(folder)
    assert 1 <= len(text) <= 128 and text.isprintable() and not re.search(r"[#?%:\\*]", text)


# -- tensorboard --------------------------------------------------------------------------------


def events(folder):
    """The steps a reader shows, by tag."""
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = reading.EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    found.Reload()
    return {tag: [e.step for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_no_step_is_there_twice_for_a_reader(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    settings = {**SHORT, "loggers": ["tensorboard"], "checkpoint_minutes": 1e9}

    def cut(state, batch):
        if state.step == 7:
            raise InterruptedError
        return train_step(state, batch)

    with monkeypatch.context() as patch:
        patch.setattr("sidechain.sae.training.trainer.train_step", cut)
        with pytest.raises(InterruptedError):
            train(rows(), tmp_path, **settings)
    assert events(tmp_path)["fvu"] == [2, 4]  # flushed and closed; 6 was still to come
    train(rows(), tmp_path, **settings)  # from the start: there is no checkpoint
    assert all(steps == [2, 4, 6, 8, 10, 12] for steps in events(tmp_path).values())
    assert {"fvu", "l0", "tokens_per_s"} <= events(tmp_path).keys()


class FakeWriter:
    made: ClassVar[list[FakeWriter]] = []

    def __init__(self, log_dir, purge_step=None):
        self.purge_step, self.rows, self.calls = purge_step, [], []
        FakeWriter.made.append(self)
        Path(log_dir).mkdir(exist_ok=True)
        (Path(log_dir) / f"events.{len(FakeWriter.made)}").touch()

    def add_scalar(self, name, value, step):
        self.rows.append((name, value, step))

    def flush(self):
        self.calls.append("flush")

    def close(self):
        self.calls.append("close")


def test_the_writer_is_told_what_to_drop_and_closed(tmp_path, monkeypatch):
    fake = types.ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = FakeWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    FakeWriter.made.clear()
    for done in (0, 4):
        loggers = Loggers(["tensorboard"], tmp_path, {}, done)
        loggers.write(done + 2, {"fvu": math.nan})
        loggers.close(failed=False)
    first, second = FakeWriter.made
    assert (first.purge_step, second.purge_step) == (None, 5)
    assert first.calls == second.calls == ["flush", "close"]
    assert second.rows[0][0] == "fvu" and second.rows[0][2] == 6
