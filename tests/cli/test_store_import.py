# SPDX-License-Identifier: Apache-2.0
"""`sidechain store import`."""

from __future__ import annotations

import numpy as np
import pytest

from sidechain.cli import main as cli
from sidechain.store import ActivationStore

D = 5
X = np.random.default_rng(0).standard_normal((40, D)).astype(np.float32)


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bad = X.copy()
    bad[7] = np.inf
    for name, values in {"x": X, "bad": bad, "large": X * 1e6, "steps": np.arange(40) % 3}.items():
        np.save(f"{name}.npy", values)
    np.savez("several.npz", X, X)
    (tmp_path / "notes.txt").write_text("none")


def answer(line):
    return cli.main(["store", "import", *line.split()])


def test_every_option(capsys):
    line = "bad.npy acts --steps steps.npy --site mlp:3 --dtype bfloat16 --on-bad-rows skip"
    assert answer(line) == 0
    assert capsys.readouterr().out == "acts mlp:3: 39 rows of 5, 1 bad left out\n"
    store = ActivationStore("acts", "mlp:3")
    assert str(store.dtype) == "torch.bfloat16"
    assert store.labels(range(39)).step.tolist() == [n % 3 for n in range(40) if n != 7]


def test_rows_stay_as_they_are(capsys):
    assert answer("x.npy acts") == 0
    assert capsys.readouterr().out == "acts rows: 40 rows of 5\n"
    np.testing.assert_array_equal(ActivationStore("acts").read(range(40)).numpy(), X)


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("", "expected SOURCE, got none"),
        ("x.npy", "expected OUT, got none"),
        ("nowhere.npy acts", "expected a file or folder, got nothing at nowhere.npy"),
        ("notes.txt acts", "expected a file of .npy"),
        ("bad.npy acts", "got row 7"),
        ("large.npy acts --dtype float16", "within 65504 [float16], got"),
        ("x.npy acts --dtype int8", "invalid choice: 'int8'"),
        ("x.npy acts --on-bad-rows drop", "invalid choice: 'drop'"),
        ("x.npy acts --column a", "expected no column with x.npy"),
        ("x.npy acts --steps nowhere.npy", "--steps: expected a file, got 'nowhere.npy'"),
        ("x.npy acts --steps notes.txt", "--steps: expected a .npy file of steps, got notes.txt"),
        ("x.npy acts --steps several.npz", "--steps: expected a .npy file of steps, got several"),
        ("x.npy acts --steps x.npy", "expected whole steps"),
        ("x.npy notes.txt", "OUT: expected a folder, got the file 'notes.txt'"),
        ("x.npy .", "expected an empty folder as out, got ."),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(line, text, capsys, tmp_path):
    before = sorted(tmp_path.iterdir())
    assert answer(line) == 2
    lines = capsys.readouterr().err.splitlines()
    error = [one for one in lines if one and "row/s" not in one]  # without the progress bar
    assert len(error) == 1 and text in error[0], error
    assert sorted(tmp_path.iterdir()) == before
