# SPDX-License-Identifier: Apache-2.0
"""The table of architectures shows what was trained."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from functools import partial

import pytest
import torch

from sidechain import sae
from sidechain.sae.architectures.registry import ARCHITECTURES
from sidechain.sae.planted import share_found
from sidechain.sae.training.train_config import PENALTIES
from sidechain.zoo import load
from sidechain.zoo.recipes import architectures, train_sae
from sidechain.zoo.recipes.architectures import SHORT, VARIANTS, figures_of, install

FOLDER = load.WEIGHTS / load.SAES
SMALL = SHORT.planted[0]
TOKENS = SMALL.rows - architectures.HELD_OUT


def test_every_architecture_and_penalty_has_a_row():
    chosen = {shape["architecture"] for shape in VARIANTS.values()}
    penalties = {shape["penalty"] for shape in VARIANTS.values() if "penalty" in shape}
    assert chosen == set(ARCHITECTURES) and penalties == set(PENALTIES)


def test_figures_are_those_of_dense_float64(tmp_path):
    trained = sae.train(
        partial(architectures.chunks, SMALL, 0, 1 << 14), tmp_path, features=64, tokens=1 << 14,
        architecture="topk", batch=512, k=3, lr=3e-3, progress=False,
    )  # fmt: skip
    # Off the mean of the training rows, and so few that some features stay silent.
    x = torch.from_numpy(SMALL.slice(20_000, 20_020)) + 0.3
    y = (x - trained.normaliser.mean[0]).double() / trained.normaliser.scale[0].double()
    wide = {name: value.double() for name, value in trained.state_dict().items()}
    z = (y - wide["b_dec"]) @ wide["w_enc"].T + wide["b_enc"]
    top = z.topk(3, 1)
    v = torch.zeros_like(z).scatter(1, top.indices, top.values.relu())
    error = (v @ wide["w_dec"] + wide["b_dec"] - y).square().sum()
    found = figures_of(trained, [x[:13], x[13:]])
    assert found["fvu"] == pytest.approx(float(error / (y - y.mean(0)).square().sum()), rel=1e-3)
    assert found["l0"] == pytest.approx(float((v > 0).sum(1).double().mean()), rel=1e-3)
    assert found["dead"] == float(((v > 0).sum(0) == 0).double().mean()) > 0.1


def unseen():
    return architectures.chunks(SMALL, TOKENS, SMALL.rows)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("table")
    return out, architectures.make(out, SHORT)


def test_short_table_is_whole(made):
    out, table = made
    assert json.loads((out / train_sae.TABLE).read_text()) == json.loads(json.dumps(table))
    parts = [part["variants"] for part in table["planted"]] + [table["zoo"]["variants"]]
    assert len(parts) == 2 and all(set(part) == set(VARIANTS) for part in parts)
    for row in itertools.chain.from_iterable(part.values() for part in parts):
        assert math.isfinite(row["fvu"]) and row["fvu"] > 0
        assert row["l0"] >= 0 and 0 <= row["dead"] <= 1
    # What a selecting one is asked for, which no threshold and no penalty changes.
    assert parts[0]["topk"]["l0"] == pytest.approx(SMALL.active, abs=0.1)
    assert len({tuple(row.values()) for row in parts[0].values()}) == len(VARIANTS)


@pytest.mark.parametrize("name", VARIANTS)
def test_each_row_is_of_the_dictionary_it_names(name, made):
    out, table = made
    folder = out / "planted-24-48-3" / name.replace(", ", "-")
    trained, row = sae.Sae.load(folder / "sae.safetensors"), table["planted"][0]["variants"][name]
    assert trained.config.architecture == VARIANTS[name]["architecture"]
    for figure, value in figures_of(trained, unseen()).items():
        assert row[figure] == pytest.approx(value, abs=1e-4), figure
    for bar in (0.9, 0.95):
        assert row[f"found_{bar}"] == pytest.approx(
            share_found(trained.w_dec, SMALL.directions(), bar), abs=1e-4
        )


def test_the_card_gets_the_table_and_nothing_else_changes(made, tmp_path):
    _, table = made
    folder = tmp_path / "sae"
    shutil.copytree(FOLDER, folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    install(table, folder)
    load.verify(folder)
    changed = {p.name for p in folder.iterdir() if before.get(p.name) != p.read_bytes()}
    assert changed <= {"README.md", train_sae.TABLE, "checksums.json"}
    card = (folder / "README.md").read_text()
    for part in (table["planted"][0]["variants"], table["zoo"]["variants"]):
        for name, row in part.items():
            assert f"| {name} | " + " | ".join(str(v) for v in row.values()) + " |" in card
    assert "| cross:6 |" in card
    install(table, folder)
    assert (folder / "README.md").read_text() == card
