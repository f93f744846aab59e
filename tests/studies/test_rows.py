# SPDX-License-Identifier: Apache-2.0
"""A dictionary on rows of one's own: metrics, strongest features, what the page shows."""

from __future__ import annotations

import base64
import io
import json
import re

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from sidechain._errors import InputError
from sidechain.sae import Sae, SaeConfig
from sidechain.store import ArrayRows, import_rows
from sidechain.studies.features import rows_page
from sidechain.studies.features.rows import score_rows

D, F, N = 4, 6, 50


@pytest.fixture(scope="module")
def sae():
    """relu(x_j) for the first four features; 4 is never active, 5 points where nothing is."""
    made = Sae(SaeConfig(D, F, "topk", k=3), seed=0)
    weights = {name: torch.zeros_like(t) for name, t in made.weights().items()}
    weights["w_enc"][:D] = torch.eye(D)
    weights["w_dec"][:D] = torch.eye(D)
    weights["w_dec"][0] *= 3.0  # its output counts nine times
    made.fill(weights)
    return made.eval()


@pytest.fixture(scope="module")
def x():
    g = torch.Generator().manual_seed(0)
    x = torch.zeros(N, D)
    x[::2, 0] = 1.0 + torch.rand(25, generator=g)
    x[1::5, 1] = 2.0 + torch.rand(10, generator=g)
    x[7, 2] = 9.0
    return x


def test_metrics_and_the_strongest_features(sae, x):
    study = score_rows(sae, ArrayRows(x), strongest=2, examples=3)
    y_hat = x.double().relu() * torch.tensor([3.0, 1, 1, 1])
    error = (x.double() - y_hat).square().sum()
    assert study.health.fvu == pytest.approx(
        float(error / (x - x.mean(0)).double().square().sum()), rel=1e-5
    )
    assert study.health.l0 == pytest.approx(36 / N)
    assert study.health.dead == pytest.approx(3 / 6)
    strength = y_hat.square().mean(0)
    order = strength.argsort(descending=True)[:2].tolist()
    assert [one.feature for one in study.strong] == order
    for one in study.strong:
        f = one.feature
        assert one.share == pytest.approx(float(strength[f] / strength.sum()), rel=1e-5)
        assert one.density == pytest.approx(float((x[:, f] > 0).double().mean()))
        on = x[:, f][x[:, f] > 0].double()
        assert one.mean == pytest.approx(float(on.square().mean().sqrt()), rel=1e-5)
        rows = x[:, f].argsort(descending=True, stable=True)[:3].tolist()
        assert [e.row for e in one.examples] == rows[: len(on)]
        assert [e.value for e in one.examples] == pytest.approx(x[rows, f][: len(on)].tolist())


def test_tables(sae, x, tmp_path):
    study = score_rows(sae, ArrayRows(x, name="x.npy"), name="mine")
    study.write(tmp_path)
    health = pd.read_csv(tmp_path / "health.csv")
    assert health.site[0] == "mine" and health.rows[0] == N
    assert pd.read_csv(tmp_path / "density.csv").features.sum() == 3  # the others are dead
    assert set(pd.read_csv(tmp_path / "features.csv").feature) == {0, 1, 2}
    examples = pd.read_csv(tmp_path / "examples.csv")
    assert list(examples.row[examples.feature == 2]) == [7]
    assert json.loads((tmp_path / "summary.json").read_text())["fvu_by_step"] == {}


def test_a_store_of_the_same_rows_and_steps(sae, x, tmp_path):
    steps = np.arange(N) % 3
    one = score_rows(sae, ArrayRows(x, steps=steps))
    two = score_rows(sae, import_rows(x, tmp_path / "acts", steps=steps, progress=False))
    assert two.health_table().drop(columns="site").equals(one.health_table().drop(columns="site"))
    assert two.example_table().equals(one.example_table())
    assert set(one.example_table().step) == {0, 1, 2}
    assert "row 7, step 1" in rows_page.write(one, tmp_path / "one.html").read_text()


def test_nothing_active(sae, tmp_path):
    study = score_rows(sae, ArrayRows(-torch.rand(9, D)))
    assert study.strong == [] and study.health.dead == 1.0
    study.write(tmp_path)
    text = rows_page.write(study, tmp_path / "page.html").read_text()
    assert "No feature is active in any row." in text


def images(text):
    found = re.findall(r'<img class="item" src="data:image/png;base64,([^"]+)"', text)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(one)))) for one in found]


def test_items_of_all_kinds(sae, x, tmp_path):
    study = score_rows(sae, ArrayRows(x), examples=25)
    rows = [example.row for one in study.strong for example in one.examples]
    assert len(set(rows)) < len(rows)  # features share some
    path = tmp_path / "page.html"

    text = rows_page.write(study, path, show=lambda row: f"<b>item {row}</b>").read_text()
    assert "&lt;b&gt;item 7&lt;/b&gt;" in text and not images(text)

    calls = []
    grey = np.linspace(0, 1, 12).reshape(3, 4)
    shown = rows_page.write(study, path, show=lambda row: calls.append(row) or grey).read_text()
    assert sorted(calls) == sorted(set(rows))  # once for a row
    for image in images(shown):
        np.testing.assert_array_equal(image, np.rint(255 * grey))

    red = np.zeros((5, 6, 3), np.uint8)
    red[..., 0] = 200
    Image.fromarray(red).save(tmp_path / "red.png")
    kinds = (tmp_path / "red.png", str(tmp_path / "red.png"), red, torch.from_numpy(red))
    for item in kinds:
        found = images(rows_page.write(study, path, show=lambda row, item=item: item).read_text())
        assert found and all((image == red).all() for image in found)

    large = np.zeros((2000, 1000), np.uint8)
    found = images(rows_page.write(study, path, show=lambda row: large).read_text())
    assert found[0].shape == (512, 256)


@pytest.mark.parametrize(
    ("item", "text"),
    [
        (None, "a text, the path of an image or an array for row [0-9]+, got NoneType"),
        (7, "got int"),
        (np.zeros(3), r"for row [0-9]+, got image_png: expected \[H, W\], .* got \[3\]"),
        (np.zeros((3, 3, 2)), r"got \[3, 3, 2\]"),
        (np.zeros((0, 4)), r"got \[0, 4\]"),
        (np.zeros((3, 3), complex), "of complex128"),
    ],
)
def test_items_that_cannot_be_shown(sae, x, tmp_path, item, text):
    study = score_rows(sae, ArrayRows(x), examples=1)
    with pytest.raises(InputError, match=f"show: expected .*{text}"):
        rows_page.write(study, tmp_path / "page.html", show=lambda row: item)
    assert not (tmp_path / "page.html").exists()


def test_files_that_are_no_images(sae, x, tmp_path):
    study = score_rows(sae, ArrayRows(x), examples=1)
    (tmp_path / "no.png").write_text("none")
    for item in (tmp_path / "no.png", tmp_path / "nowhere.png"):
        with pytest.raises(InputError, match="expected an image for row"):
            rows_page.write(study, tmp_path / "page.html", show=lambda row, item=item: item)
    # A text that names no file is a text.
    shown = rows_page.write(study, tmp_path / "page.html", show=lambda row: "nowhere.png")
    assert '<p class="item">nowhere.png</p>' in shown.read_text()
