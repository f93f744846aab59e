# SPDX-License-Identifier: Apache-2.0
"""`sidechain sae score DICT --rows FILE`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from sidechain.cli import main as cli
from sidechain.sae import Normaliser, Sae, SaeConfig, formats
from sidechain.sae.features.evaluate import measure
from sidechain.store import ArrayRows, import_rows

D = 6
X = torch.randn(80, D, generator=torch.Generator().manual_seed(0))
STEPS = torch.arange(80) % 2


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", X.numpy())
    np.save("wide.npy", np.ones((4, D + 1), np.float32))
    np.save("steps.npy", STEPS.numpy())
    bad = X.clone()
    bad[7, 1] = float("nan")
    np.save("bad.npy", bad.numpy())
    import_rows(X, "acts", steps=STEPS, progress=False)
    sae = Sae(SaeConfig(D, 16, "topk", k=3), seed=0)
    formats.save(sae, "own.safetensors")
    formats.save(sae, "eleuther", "sparsify")
    both = Normaliser(torch.zeros(2, D), torch.tensor([1.0, 2.0]), torch.tensor([0, 1]))
    Sae(SaeConfig(D, 16, "topk", k=3), normaliser=both, seed=0).save("steps.safetensors")
    formats.save(Sae(SaeConfig(D, 16, "topk", k=3, transcoder=True)), "trans.safetensors")


def answer(line):
    return cli.main(["sae", "score", *line.split()])


@pytest.mark.parametrize("dictionary", ["own.safetensors", "eleuther"])
def test_files_page_and_one_line(dictionary, tmp_path, capsys):
    assert answer(f"{dictionary} --rows x.npy --strongest 2 --examples 3 --out out") == 0
    first, last = capsys.readouterr().out.splitlines()
    found = measure(formats.load(dictionary), ArrayRows(X))
    assert first == (
        f"FVU {found.fvu:.4f}, L0 {found.l0:.1f}, dead {found.dead:.1%} of 16 features on 80 rows"
    )
    assert last == "out/report.html" and (tmp_path / last).is_file()
    health = pd.read_csv("out/health.csv")
    assert health.fvu[0] == pytest.approx(found.fvu, abs=1e-6) and health.rows[0] == 80
    assert len(pd.read_csv("out/features.csv")) == 2
    assert len(pd.read_csv("out/examples.csv")) == 6


def test_steps_and_stores_say_the_same():
    assert answer("steps.safetensors --rows x.npy --row-steps steps.npy --out one") == 0
    assert answer("steps.safetensors --rows acts --out two") == 0
    assert answer("steps.safetensors --rows acts --column rows --out three") == 0
    tables = [pd.read_csv(f"{out}/health.csv") for out in ("one", "two", "three")]
    assert tables[0].equals(tables[1]) and tables[0].equals(tables[2])
    assert len(json.loads(Path("one/summary.json").read_text())["fvu_by_step"]) == 2


def test_a_run_is_replayed_and_made_again(capsys):
    assert answer("own.safetensors --rows x.npy --strongest 5 --out one") == 0
    assert answer("--config one --out two") == 0
    assert answer("own.safetensors --rows x.npy --strongest 5 --out one") == 0
    for name in ("health", "features", "examples", "density"):
        assert Path(f"one/{name}.csv").read_text() == Path(f"two/{name}.csv").read_text()


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("own.safetensors", "--rows: expected the rows to measure own.safetensors on, got none"),
        ("--rows x.npy", "expected DICT [what to measure on --rows], got none"),
        ("own.safetensors --rows nowhere.npy", "got nothing at nowhere.npy"),
        ("own.safetensors --rows steps.safetensors", "expected column to be one of"),
        ("nowhere --rows x.npy", "expected a dictionary, got nothing at nowhere"),
        ("own.safetensors --rows wide.npy", "expected rows of width 6, got 7"),
        ("own.safetensors --rows bad.npy", "got row 7"),
        ("own.safetensors --rows x.npy --row-steps wide.npy", "expected whole steps"),
        ("own.safetensors --rows x.npy --row-steps nowhere.npy", "--row-steps: expected a file"),
        ("own.safetensors --rows acts --row-steps steps.npy", "--row-steps: expected none with a"),
        ("own.safetensors --rows acts --column b", "expected a site of ['rows'], got 'b'"),
        ("own.safetensors --rows x.npy --column b", "expected no column with x.npy"),
        ("own.safetensors --rows x.npy --concepts drums", "--concepts: expected none with --rows"),
        ("own.safetensors --rows x.npy --examples 0", "--examples: expected at least 1, got 0"),
        ("own.safetensors --rows x.npy --strongest -1", "--strongest: expected at least 0"),
        ("own.safetensors --rows x.npy --device cuda:63", "--device: expected a device of this"),
        ("steps.safetensors --rows x.npy", "--row-steps: expected the scheduler step of each row"),
        ("trans.safetensors --rows x.npy", "expected an autoencoder, got a transcoder"),
        ("--column b", "--column: expected none without DICT and --rows, got 'b'"),
        ("--strongest 3", "--strongest: expected none without DICT and --rows, got '3'"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(line, text, capsys, tmp_path):
    before = sorted(tmp_path.iterdir())
    assert answer(f"{line} --out out") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and text in error, error
    assert sorted(tmp_path.iterdir()) == before


def test_the_folder_of_another_run_stays(capsys):
    assert answer("own.safetensors --rows x.npy --out out") == 0
    there = Path("out/health.csv").read_text()
    assert answer("steps.safetensors --rows acts --out out") == 2
    assert "--out: expected a new folder or the same settings" in capsys.readouterr().err
    np.save("x.npy", 2 * X.numpy())  # the same name, other rows
    assert answer("own.safetensors --rows x.npy --out out") == 2
    assert "rows is" in capsys.readouterr().err
    assert Path("out/health.csv").read_text() == there
