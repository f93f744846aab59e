# SPDX-License-Identifier: Apache-2.0
"""Runs that start from a dictionary, and what they keep of it."""

from __future__ import annotations

import json

import pytest
import torch

from sae.oracle import planted
from sidechain._errors import InputError
from sidechain.sae import Sae, formats, train
from sidechain.sae.features.evaluate import measure
from sidechain.store import ArrayRows

D = 24
KW = dict(batch=256, progress=False)
FORMATS = ("sparsify", "saelens", "dictionary_learning")


@pytest.fixture(scope="module")
def x():
    """Rows far from mean 0 and norm 1: a dictionary in other units would be lost on them."""
    return planted(4096, D)[0] * 7 + 3


@pytest.fixture(scope="module")
def trained(x, tmp_path_factory):
    folder = tmp_path_factory.mktemp("first")
    train(x, folder, features=64, k=4, architecture="topk", lr=3e-3, epochs=4, **KW)
    return folder


def fvu(sae, x):
    return measure(sae, ArrayRows(x)).fvu


def equal(a, b):
    return all(torch.equal(t, b.state_dict()[n]) for n, t in a.state_dict().items())


@pytest.mark.parametrize("format", ["sidechain", *FORMATS])
def test_before_the_first_update_it_is_the_dictionary(x, trained, tmp_path, format):
    """With a learning rate of almost nothing the run ends with the map that it began with."""
    place = tmp_path / ("d.safetensors" if format == "sidechain" else "d")
    formats.save(Sae.load(trained / "sae.safetensors"), place, format)
    old = formats.load(place)
    new = train(x, tmp_path / "run", start=place, lr=1e-30, **KW)
    with torch.no_grad():
        error = (new(x) - old(x)).norm() / old(x).norm()
    assert float(error) < 1e-5
    assert new.provenance.extra["start"]["format"] == format
    assert new.provenance.metrics["fvu"] == pytest.approx(fvu(old, x), abs=0.02)


@pytest.mark.parametrize("format", FORMATS)
def test_imported_trained_on_and_written_again(x, trained, tmp_path, format):
    formats.save(Sae.load(trained / "sae.safetensors"), tmp_path / "theirs", format)
    before = fvu(formats.load(tmp_path / "theirs"), x)
    more = train(x, tmp_path / "run", start=tmp_path / "theirs", lr=2e-3, epochs=4, **KW)
    assert fvu(more, x) < 0.95 * before
    formats.save(more, tmp_path / "again", format)
    assert fvu(formats.load(tmp_path / "again"), x) == pytest.approx(fvu(more, x), rel=1e-4)


def test_a_finished_run_knows_its_start_by_the_weights(x, trained, tmp_path):
    settings = dict(start=trained, lr=1e-3, checkpoint_minutes=0.0, log_every=2, **KW)
    whole = train(x, tmp_path / "whole", **settings)
    real = Sae.load(tmp_path / "whole" / "sae.safetensors")
    assert equal(whole, real)
    known = json.loads((tmp_path / "whole" / "run.json").read_text())["start"]
    assert known["digest"] == whole.provenance.extra["start"]["digest"]
    # Wherever the file is: the weights count.
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes((trained / "sae.safetensors").read_bytes())
    assert equal(whole, train(x, tmp_path / "whole", **{**settings, "start": moved}))
    other = Sae.load(moved)
    with torch.no_grad():
        other.b_enc += 1e-3
    for start in (other, None):
        more = {} if start is not None else dict(features=64, k=4, architecture="topk")
        with pytest.raises(InputError, match="expected a start from"):
            train(x, tmp_path / "whole", **{**settings, "start": start, **more})


def test_what_may_change(x, trained, tmp_path):
    old = Sae.load(trained / "sae.safetensors")
    sparser = train(x, tmp_path / "k", start=trained, k=2, **KW)
    assert sparser.config.k == 2 and sparser.provenance.metrics["l0"] == 2
    grown = train(x, tmp_path / "grown", start=trained, features=96, lr=1e-30, **KW)
    assert grown.config.features == 96
    torch.testing.assert_close(grown.w_dec[:64], old.w_dec, rtol=0, atol=1e-5)
    assert not torch.equal(grown.w_dec[64:], old.w_dec[:32])
    batch = train(x, tmp_path / "batch", start=trained, architecture="batch_topk", **KW)
    assert batch.config.architecture == "batch_topk" and bool(batch.threshold > 0)
    child = train(x, tmp_path / "child", start=tmp_path / "k", lr=1e-4, **KW)
    assert child.provenance.extra["start"]["start"]["digest"]  # of the first one


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (dict(features=32), InputError, "expected features >= 64"),
        (dict(architecture="relu"), InputError, "expected architecture topk, batch_topk"),
        (dict(transcoder=True), InputError, "expected transcoder=False"),
        (dict(unit_norm=False), InputError, "expected unit_norm=True"),
        (dict(start="nothing.safetensors"), FileNotFoundError, "nothing.safetensors"),
        (dict(start=5), TypeError, "expected a Sae, a file, a folder or a hub id"),
    ],
)
def test_what_may_not(x, trained, tmp_path, settings, error, message):
    with pytest.raises(error, match=message):
        train(x, tmp_path / "run", **{"start": trained, **KW, **settings})
    assert not (tmp_path / "run").exists()


def test_rows_of_another_width(x, trained, tmp_path):
    with pytest.raises(ValueError, match="expected rows of widths 24 and 24"):
        train(x[:, :8], tmp_path / "run", start=trained, **KW)
    with pytest.raises(TypeError, match="expected features"):
        train(x, tmp_path / "run", **KW)
