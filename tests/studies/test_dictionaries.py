# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json

import pandas as pd
import pytest
import torch

from sidechain.pipelines import sites
from sidechain.sae import Sae, SaeConfig
from sidechain.sae.features.evaluate import measure
from sidechain.sae.features.scoring import METHODS
from sidechain.store import ActivationStore
from sidechain.studies import steering
from sidechain.studies.features import page as report
from sidechain.studies.features.run import DictionaryConfig, listen, run
from sidechain.studies.vectors.run import VectorConfig, build
from sidechain.vectors import SteeringVector

F = 20


@pytest.fixture
def folder(model, tmp_path):
    """Random dictionaries of two of the three sites."""
    place = tmp_path / "dictionaries"
    place.mkdir()
    for index in (1, 2):
        width = sites(model.pipe, f"cross:{index}")[0].width
        sae = Sae(SaeConfig(width, F, "topk", k=3), seed=index)
        sae.save(place / f"cross-{index}.safetensors")
    return place


def config(tmp_path, folder, **changes):
    settings = {
        "out": tmp_path / "run", "dictionaries": folder, "concepts": ("drums", "violin"),
        "features": 2, "moments": 2, "pairs": 2, "prompts": 3, "steps": 2, "batch_rows": 4,
    }  # fmt: skip
    return DictionaryConfig(**{**settings, **changes})


def test_tables_and_report(model, tmp_path, folder):
    study = run(config(tmp_path, folder))
    assert list(study.health) == ["cross:1", "cross:2"]  # the site without one is left out
    store = ActivationStore(tmp_path / "run" / "activations", "cross:2")
    again = measure(Sae.load(folder / "cross-2.safetensors"), store)
    assert study.health["cross:2"].fvu == pytest.approx(again.fvu)
    found = pd.read_csv(tmp_path / "run" / "features.csv")
    assert len(found) == 2 * 2 * 2 and set(found.concept) == {"drums", "violin"}
    scores = pd.read_csv(tmp_path / "run" / "scores.csv")
    assert set(scores.method) == set(METHODS) and len(scores) == 2 * 2 * len(METHODS) * 2
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert len(summary["fvu_by_step"]["cross:1"]) == 2
    page = report.write(study, tmp_path / "run" / "report.html").read_text()
    for text in ("Features to hear", "Held-out metrics", "data:audio/flac", 'class="trace"'):
        assert text in page


def test_what_is_heard_is_where_the_feature_is_largest(model, tmp_path, folder):
    study = run(config(tmp_path, folder))
    with_moments = [one for one in study.found if one.moments][:2]
    assert with_moments
    for one, heard in zip(with_moments, listen(study, with_moments), strict=True):
        for moment, clip in zip(one.moments, heard, strict=True):
            if moment.token:  # not the global one, which is no part of the clip
                assert clip.trace[moment.token - 1] == pytest.approx(moment.value)
                assert int(clip.place * len(clip.trace)) == moment.token - 1
            assert max(clip.trace) <= moment.value + 1e-6
            assert len(clip.audio) and f"step {moment.step}" in clip.note


def test_steering_by_features(model, tmp_path, folder):
    found = steering.run(
        steering.SteeringConfig(
            out=tmp_path / "steer",
            concept="drums",
            method="sae",
            dictionaries=folder,
            features=4,
            strengths=(0.0, 1.0),
            sites="cross:2",
            prompts=2,
            steps=2,
            batch_rows=8,
            arms=("localized", "random"),
        )
    )
    vector = SteeringVector.load(tmp_path / "steer" / "vector.safetensors", model.pipe)
    assert vector.provenance.method == "sae:tada:natural:4"
    assert len(vector.sites) == 2 and set(found.readings.arm) == {"none", "localized", "random"}


def test_more_features_come_closer_to_the_mean_difference(model, folder):
    """With all features of a complete dictionary the two methods agree."""
    width = sites(model.pipe, "cross:1")[0].width
    sae = Sae(SaeConfig(width, 2 * width, "relu", tied_bias=False))
    with torch.no_grad():  # relu(x) - relu(-x) = x
        both = torch.cat([torch.eye(width), -torch.eye(width)])
        sae.w_enc.copy_(both)
        sae.w_dec.copy_(both)
    sae.save(folder / "cross-1.safetensors")
    shared = {"concept": "drums", "sites": "cross:1", "pairs": 2, "steps": 2, "batch_rows": 4}
    by_means = build(model.subject, VectorConfig(**shared), progress=False)
    by_features = build(
        model.subject,
        VectorConfig(**shared, method="sae", dictionaries=folder, features=2 * width),
        progress=False,
    )
    name = by_features.sites[0]
    torch.testing.assert_close(by_features[name], by_means[name], rtol=1e-4, atol=1e-5)


BAD = {
    "score": ({"score": "best"}, "score: expected one of tada"),
    "concept": ({"concepts": ("love",)}, "concept: expected one of"),
    "sites": ({"sites": "cross:0"}, r"expected a dictionary in .* for one of cross:0, got none"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_settings(model, tmp_path, folder, name):
    changes, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        run(config(tmp_path, folder, **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"method": "magic"}, "method: expected one of caa, sae"),
        ({"method": "sae", "sites": "cross:0"}, r"sites of cross:1-2 .*, got cross:0"),
    ],
)
def test_bad_steering(model, tmp_path, folder, changes, message):
    settings = {"concept": "drums", "dictionaries": folder, "sites": "cross:1"}
    with pytest.raises(ValueError, match=message):
        steering.run(steering.SteeringConfig(out=tmp_path / "steer", **{**settings, **changes}))
    assert not (tmp_path / "steer").exists()
