# SPDX-License-Identifier: Apache-2.0
"""Bad input is one line and exit code 2; a bug shows its traceback and ends with 1; Ctrl-C, 130."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cli.support import write
from sidechain import InputError
from sidechain._errors import is_bad_input
from sidechain.cli import main as cli
from sidechain.io import atomic
from sidechain.studies import common, localization, models
from sidechain.taps.options import parse_tokens
from sidechain.testing import tiny_pipeline


@pytest.fixture
def fail(studies, monkeypatch):
    """Run a command whose study raises."""

    def run(error, *words):
        def raising(config):
            raise error

        monkeypatch.setattr(localization, "run", raising)
        return cli.main([*words, "localize"])

    return run


class TestBadInput:
    @pytest.mark.parametrize(
        ("error", "line"),
        [
            (InputError("a\nb"), "a b"),
            (OSError("a b"), "a b"),
            (OSError(28, "No space left on device", "runs/x"), "No space left on device: runs/x"),
        ],
    )
    def test_one_line(self, fail, capsys, error, line):
        assert fail(error) == 2
        assert capsys.readouterr().err == f"sidechain: error: {line}\n"

    def test_contracts_of_the_library(self):
        with pytest.raises((TypeError, ValueError)) as caught:
            parse_tokens("capture", "some")
        assert is_bad_input(caught.value)

    def test_traceback_on_request(self, fail, capsys):
        assert fail(InputError("a b"), "--traceback") == 2
        error = capsys.readouterr().err
        assert error.startswith("Traceback")
        assert error.endswith("sidechain: error: a b\n")


class TestBugs:
    def check(self, capsys, name):
        error = capsys.readouterr().err
        assert error.startswith("Traceback")
        assert name in error
        assert error.splitlines()[-1].startswith("sidechain: this is a bug; please report it")

    @pytest.mark.parametrize(
        "error",
        [ValueError("a"), TypeError("a"), RuntimeError("a"), KeyError("a"), AssertionError()],
    )
    def test_what_others_raise(self, fail, capsys, error):
        """Raised outside of the package, as by a library that it calls."""
        assert fail(error) == 1
        self.check(capsys, type(error).__name__)

    @pytest.mark.parametrize("name", ["pairs_of", "RunFolder"])
    def test_planted_in_a_study(self, capsys, monkeypatch, tmp_path, name):
        """Bugs in a frame of the package: Python and NumPy raise ValueError there too."""
        study = importlib.import_module("sidechain.studies.localization.run")
        monkeypatch.setattr(models, "load", lambda *_: models.MusicSubject(tiny_pipeline("music")))
        monkeypatch.setattr(common, "load_scorers", lambda *_: {})
        source = {
            "pairs_of": "def pairs_of(config, name):\n    return int('many')\n",
            "RunFolder": "def RunFolder(*_, **__):\n    return np.zeros(3) + np.zeros(2)\n",
        }[name]
        space = {"np": np}
        exec(compile(source, study.__file__, "exec"), space)
        monkeypatch.setattr(study, name, space[name])
        assert cli.main(["localize", "--out", str(tmp_path / "run")]) == 1
        self.check(capsys, "ValueError")


class TestInterrupt:
    def test_in_a_study(self, fail, capsys):
        assert fail(KeyboardInterrupt()) == 130
        assert capsys.readouterr().err == "sidechain: interrupted\n"

    def test_while_torch_is_imported(self, tmp_path):
        write(tmp_path / "torch.py", "raise KeyboardInterrupt\n")
        path = os.pathsep.join([str(tmp_path), *sys.path])
        run = subprocess.run(
            [sys.executable, "-m", "sidechain", "doctor"],
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == 130
        assert run.stderr == "sidechain: interrupted\n"


class TestFullDisk:
    """`OSError: [Errno 28]` without a name, as the system reports it while a file is written."""

    @pytest.fixture
    def full(self, monkeypatch):
        """A file on a device that is full, instead of each temporary one."""
        full = Path("/dev/full")
        monkeypatch.setattr(atomic, "open", lambda *_: full.open("wb"), raising=False)

    def test_a_file_is_named_and_what_was_there_stays(self, full, tmp_path):
        (tmp_path / "a.json").write_text("old")
        with pytest.raises(OSError, match="No space left on device") as caught:
            atomic.write_text(tmp_path / "a.json", "new")
        assert caught.value.filename == str(tmp_path / "a.json")
        assert (tmp_path / "a.json").read_text() == "old"
        assert [p.name for p in tmp_path.iterdir()] == ["a.json"]

    def test_tensors(self, tmp_path, monkeypatch):
        import torch

        from sidechain.io import tensors

        def save_file(*_):
            raise tensors.safetensors.SafetensorError(
                "Error while serializing: I/O error: No space left on device (os error 28)"
            )

        monkeypatch.setattr(tensors.safetensors.torch, "save_file", save_file)
        path = tmp_path / "v.safetensors"
        with pytest.raises(OSError, match="No space left on device") as caught:
            tensors.write_tensors(path, {"a": torch.zeros(2)}, {})
        assert (caught.value.errno, caught.value.filename) == (28, str(path))
        assert not list(tmp_path.iterdir())

    def test_in_a_command(self, full, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(models, "load", lambda *_: models.MusicSubject(tiny_pipeline("music")))
        monkeypatch.setattr(common, "load_scorers", lambda *_: {})
        out = tmp_path / "run"
        assert cli.main(["localize", "--steps", "1", "--out", str(out)]) == 2
        error = capsys.readouterr().err
        assert error == f"sidechain: error: No space left on device: {out / 'manifest.json'}\n"
