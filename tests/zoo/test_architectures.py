# SPDX-License-Identifier: Apache-2.0
"""Planted rows are what they say, and the table of architectures shows what was trained."""

from __future__ import annotations

import itertools
import json
import math
import shutil

import pytest
import torch

from sidechain import sae
from sidechain.sae.architectures.registry import ARCHITECTURES
from sidechain.sae.training.train_config import PENALTIES
from sidechain.zoo import load
from sidechain.zoo.recipes import architectures, train_sae
from sidechain.zoo.recipes.architectures import SHORT, VARIANTS, figures_of, install
from sidechain.zoo.recipes.planted import CHUNK, Planted

FOLDER = load.WEIGHTS / load.SAES
SMALL = Planted(24, 48, 3)


class TestPlanted:
    def test_rows_are_sums_of_as_many_atoms(self):
        """With fewer atoms than the width the weights follow from the rows by least squares."""
        planted = Planted(24, 12, 3, noise=0.0)
        weights = torch.linalg.lstsq(
            planted.dictionary().double().T, planted.chunk(5).double().T
        ).solution.T
        active = weights.abs() > 1e-4
        assert torch.equal(active.sum(1), torch.full((CHUNK,), 3))
        assert weights[active].min() >= 1 - 1e-4 and weights[active].max() < 2 + 1e-4
        assert (active.double().mean(0) - 3 / 12).abs().max() < 0.04

    def test_noise_has_its_size(self):
        loud, still = (Planted(24, 48, 3, noise=n).chunk(0) for n in (0.1, 0.0))
        assert float((loud - still).std()) == pytest.approx(0.1, rel=0.02)

    def test_chunks_differ_and_come_again(self):
        first, second = itertools.islice(SMALL.rows(), 2)
        assert not torch.equal(first, second)
        assert torch.equal(next(iter(SMALL.rows(1))), second)
        assert not torch.equal(Planted(24, 48, 3, seed=1).chunk(0), first)

    def test_found_counts_atoms_by_cosine_with_sign(self):
        atoms = SMALL.dictionary()
        assert SMALL.found(7 * atoms, 0.999) == 1.0
        assert SMALL.found(-atoms, 0.9) == 0.0
        assert SMALL.found(torch.cat([atoms[:12], torch.zeros(3, 24)]), 0.95) == 12 / 48
        # A row at a cosine of .92 counts for the lower bar alone.
        other = torch.linalg.qr(torch.stack([atoms[0], atoms[1]]).T).Q[:, 1]
        tilted = (0.92 * atoms[0] + (1 - 0.92**2) ** 0.5 * other)[None]
        assert SMALL.found(tilted, 0.95) == 0.0 and SMALL.found(tilted, 0.9) >= 1 / 48

    @pytest.mark.parametrize("active", [0, 49])
    def test_an_impossible_count_is_refused(self, active):
        with pytest.raises(ValueError, match=r"Planted: expected active between 1 and 48 \[atoms"):
            Planted(24, 48, active)


def test_every_architecture_and_penalty_has_a_row():
    chosen = {shape["architecture"] for shape in VARIANTS.values()}
    penalties = {shape["penalty"] for shape in VARIANTS.values() if "penalty" in shape}
    assert chosen == set(ARCHITECTURES) and penalties == set(PENALTIES)


def test_figures_are_those_of_dense_float64(tmp_path):
    trained = sae.train(
        SMALL.rows, tmp_path, features=64, tokens=4 * CHUNK, architecture="topk", batch=512, k=3,
        lr=3e-3, progress=False,
    )  # fmt: skip
    # Off the mean of the training rows, and so few that some features stay silent.
    x = SMALL.chunk(50)[:20] + 0.3
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


def chunks():
    return [SMALL.chunk(architectures._HELD_OUT + n) for n in range(8)]


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
    # The default k of the selecting ones, which no threshold and no penalty changes.
    assert parts[0]["topk"]["l0"] == pytest.approx(32, abs=1.0)
    assert len({tuple(row.values()) for row in parts[0].values()}) == len(VARIANTS)


@pytest.mark.parametrize("name", VARIANTS)
def test_each_row_is_of_the_dictionary_it_names(name, made):
    out, table = made
    folder = out / "planted-24-48-3" / name.replace(", ", "-")
    trained, row = sae.Sae.load(folder / "sae.safetensors"), table["planted"][0]["variants"][name]
    assert trained.config.architecture == VARIANTS[name]["architecture"]
    for figure, value in figures_of(trained, chunks()).items():
        assert row[figure] == pytest.approx(value, abs=1e-4), figure
    for bar in (0.9, 0.95):
        assert row[f"found_{bar}"] == pytest.approx(SMALL.found(trained.w_dec, bar), abs=1e-4)


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
