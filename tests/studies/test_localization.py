# SPDX-License-Identifier: Apache-2.0
"""Localization on a tiny model: tables, continued runs, a planted site, equal ways to compute."""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

import sidechain
from sidechain.metrics import impact_table
from sidechain.studies import localization as loc
from sidechain.studies.localization.presets import (
    Preset,
    row_masks,
    single_presets,
    top_presets,
    window_name,
    window_presets,
)
from sidechain.testing import tiny_pipeline

SITES = ["cross:0", "cross:1", "cross:2"]
TABLES = ("scores.csv", "impact.csv", "ranking.csv", "summary.json")


@pytest.fixture
def config(tmp_path):
    return loc.LocalizationConfig(
        out=tmp_path / "run", concepts=("drums", "violin"), pairs=2, steps=2, windows=2
    )


def texts(folder):
    return {name: (folder / name).read_text() for name in TABLES}


class TestPresets:
    def test_names(self):
        assert [p.name for p in single_presets(SITES)] == ["none", "all", *SITES]
        assert [p.name for p in window_presets(SITES, 2)] == ["cross:0-1", "cross:1-2"]
        assert window_presets(SITES, 1) == []
        assert [p.sites for p in top_presets(SITES[::-1])] == [
            ("cross:2",),
            ("cross:2", "cross:1"),
        ]
        assert window_name(("cross:4",)) == "cross:4"

    def test_row_masks(self):
        masks = row_masks([Preset("none", ()), Preset("w", ("cross:0", "cross:2"))], SITES)
        assert {site: mask.tolist() for site, mask in masks.items()} == {
            "cross:0": [False, True],
            "cross:1": [False, False],
            "cross:2": [False, True],
        }


class TestRun:
    def test_tables(self, model, config):
        found = loc.run(config)
        scores = pd.read_csv(config.out / "scores.csv")
        # per scorer, concept and pair: none, all, 3 sites, 2 windows, top 1 and 2
        assert len(scores) == 2 * 2 * 2 * 9
        assert model.clips == 2 * 2 * 9
        assert list(scores) == [
            *("concept", "preset", "pair", "seed", "scorer", "probability", "score"),
        ]
        assert set(scores.preset) == {
            *("none", "all", *SITES, "cross:0-1", "cross:1-2", "top:1", "top:2"),
        }
        odds = np.log(scores.probability / (1 - scores.probability))
        np.testing.assert_allclose(scores.score, odds, atol=1e-4)
        assert sorted(found.order) == SITES
        assert list(found.scorers) == ["latent", "mel", "both"]
        assert found.windows["both"].sites == ["cross:0-1", "cross:1-2"]
        assert len(pd.read_csv(config.out / "impact.csv")) == 3 * 2 * 3
        assert list(pd.read_csv(config.out / "ranking.csv").site) == found.order
        summary = json.loads((config.out / "summary.json").read_text())
        assert summary["order"] == found.order
        assert set(summary["localized"]) == {"drums", "violin"}
        for chosen in summary["localized"].values():
            assert set(chosen) <= set(SITES)
        assert summary["stability"] is None
        manifest = json.loads((config.out / "manifest.json").read_text())
        assert manifest["config"]["steps"] == 2
        assert "torch" in manifest["versions"]

    def test_seeds(self, model, config):
        found = loc.run(replace(config, seeds=(0, 1), windows=1))
        assert set(found.scores.seed) == {0, 1}
        assert not found.windows
        assert found.stability is not None
        assert found.stability_interval is not None
        assert len(found.stability.pairs) == 1
        top = found.scores[found.scores.preset == "top:1"]
        assert set(top.seed) == {0}

    def test_batch_size_does_not_matter(self, model, config, tmp_path):
        order = ["concept", "preset", "pair", "scorer"]
        whole = loc.run(config).scores.sort_values(order)
        small = loc.run(replace(config, out=tmp_path / "small", batch_rows=3)).scores
        small = small.sort_values(order)
        assert model.clips == 2 * 2 * 2 * 9
        np.testing.assert_allclose(small.score, whole.score, atol=1e-4)

    @pytest.mark.parametrize("how", ["key", "value"])
    def test_keys_or_values_alone(self, model, config, tmp_path, how):
        small = replace(config, concepts=("drums",), pairs=1, windows=1)
        found = loc.run(small).scores.set_index(["preset", "scorer"])
        other = loc.run(replace(small, out=tmp_path / how, how=how)).scores
        other = other.set_index(["preset", "scorer"])
        # Keys of one prompt with values of another are not shared: another order of sums.
        assert found.score["none", "mel"] == pytest.approx(other.score["none", "mel"], rel=2e-5)
        assert found.score["all", "mel"] != other.score["all", "mel"]

    def test_own_prompts(self, model, config):
        prompts = {"drums": [("a flute solo with drums", "a flute solo")] * 5}
        found = loc.run(replace(config, concepts=("drums",), prompts=prompts, windows=1))
        assert found.scores.pair.nunique() == 2  # `pairs` still is the limit

    def test_one_site(self, model, config):
        found = loc.run(replace(config, sites="cross:1", windows=1))
        assert found.cumulative is None
        assert found.localized == {"drums": ["cross:1"], "violin": ["cross:1"]}

    def test_comma_list_of_sites(self, model, config):
        found = loc.run(replace(config, sites="cross:2, cross:0", windows=1))
        assert found.sites == ["cross:0", "cross:2"]


class TestContinue:
    def test_cut_off_run_gives_equal_tables(self, model, config, tmp_path):
        whole = replace(config, out=tmp_path / "whole")
        loc.run(whole)
        calls = model.calls
        assert calls == 4  # two concepts, sites and best sites
        for stop in (1, 3):
            model.reset(stop_after=stop)
            with pytest.raises(KeyboardInterrupt):
                loc.run(replace(config, out=tmp_path / f"cut{stop}"))
            model.reset()
            loc.run(replace(config, out=tmp_path / f"cut{stop}"))
            assert model.calls == calls - stop
            assert texts(tmp_path / f"cut{stop}") == texts(whole.out)

    def test_finished_run_generates_nothing_and_refuses_other_settings(self, model, config):
        loc.run(config)
        first = texts(config.out)
        assert not list(config.out.rglob("*.partial"))
        model.reset(stop_after=0)
        loc.run(config)
        assert texts(config.out) == first
        with pytest.raises(ValueError, match=r"--out: expected a new folder or the same settings"):
            loc.run(replace(config, steps=3))

    def test_a_folder_with_nothing_finished_starts_anew(self, model, config):
        model.reset(stop_after=0)
        with pytest.raises(KeyboardInterrupt):
            loc.run(config)
        assert (config.out / "manifest.json").is_file()
        model.reset()
        loc.run(replace(config, pairs=1))
        manifest = json.loads((config.out / "manifest.json").read_text())
        assert manifest["config"]["pairs"] == 1


class TestPlanted:
    """Only one cross-attention says anything: the others put out zeros."""

    @pytest.fixture
    def planted(self, model, monkeypatch):
        pipe = tiny_pipeline("music", layers=3)
        for site in sidechain.sites(pipe, ["cross:0", "cross:2"]):
            site.module.to_out[0].weight.data.zero_()
        monkeypatch.setattr(model, "pipe", pipe)
        return model

    def test_is_found(self, planted, config, tmp_path):
        concepts = ("drums", "vocals", "violin", "fast", "sad", "jazz")
        found = loc.run(replace(config, concepts=concepts, pairs=1))
        impacts = {
            concept: [interval.value for interval in row]
            for concept, row in zip(concepts, found.scorers["both"].impacts, strict=True)
        }
        defined = [row for row in impacts.values() if not np.isnan(row[0])]
        assert defined  # a random scorer sees half of the concepts the wrong way round
        assert defined == [[0.0, 1.0, 0.0]] * len(defined)
        assert found.order[0] == "cross:1"
        assert found.functional == ["cross:1"]
        assert found.localized == {name: ["cross:1"] for name in concepts}
        assert found.cumulative.needed == 1
        assert [i.value for i in found.windows["both"].means] == [1.0, 1.0]
        table = impact_table.read_impacts(str(config.out / "impact.csv"))
        means = impact_table.mean_impacts(table, tau=0.1, metric="both")
        assert means[0]["block"] == "cross:1"


class TestCheckEqual:
    def test_exact_and_close(self, model, config):
        found = loc.check_equal(model.subject, config, "violin")
        assert found["all_minus_clean"] == 0.0
        assert found["none_minus_corrupted"] == 0.0
        assert found["batched_minus_single"] <= 2e-5

    def test_without_guidance(self, model, config):
        found = loc.check_equal(model.subject, replace(config, guidance=1.0), "drums")
        assert found["all_minus_clean"] == 0.0
        assert found["none_minus_corrupted"] == 0.0

    def test_sees_a_difference(self, model, config, monkeypatch):
        """The check would notice taps that do nothing."""
        module = sys.modules["sidechain.studies.localization.run"]
        monkeypatch.setattr(module, "patch", lambda *_, **__: contextlib.nullcontext())
        found = loc.check_equal(model.subject, config, "violin")
        assert found["all_minus_clean"] > 0.0
        assert found["none_minus_corrupted"] == 0.0


BAD = {
    "concept": ({"concepts": ("oboe",)}, r"--concepts: expected piano .*, got 'oboe'"),
    "site": ({"sites": "cross:9"}, r"sites: expected one of cross:0-2"),
    "self": ({"sites": "self:0"}, r"expected at least one cross site"),
    "one of two": ({"sites": "cross:0,cross:7"}, r"sites: expected one of .*, got 'cross:7'"),
    "windows": ({"windows": 4}, r"windows: expected size 1 to 3"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_bad_settings_leave_no_folder(model, config, changes, message):
    with pytest.raises(ValueError, match=message):
        loc.run(replace(config, **changes))
    assert not config.out.exists()
    assert model.clips == 0


def test_noise_depends_on_prompt_and_seed_only(model):
    from sidechain.studies import common

    encoded = model.pipe.encode_prompt(["flute"] * 3)
    seeds = [common.noise_seed(0, 0), common.noise_seed(0, 1), common.noise_seed(1, 0)]
    assert len(set(seeds)) == 3
    latents = common.generate(model.pipe, encoded, seeds, steps=2, guidance=1.0)
    alone = common.generate(model.pipe, encoded[:1], seeds[1:2], steps=2, guidance=1.0)
    torch.testing.assert_close(latents[1:2], alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(latents[0], latents[2])
