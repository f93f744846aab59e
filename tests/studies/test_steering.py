# SPDX-License-Identifier: Apache-2.0
"""Strength sweeps on a tiny model, and their curves on readings whose answer is known."""

from __future__ import annotations

import importlib
import json
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch

from sidechain.studies import common, models, vectors
from sidechain.studies import steering as st
from sidechain.studies.steering import analyse
from sidechain.testing import tiny_pipeline
from sidechain.vectors import SteeringVector
from sidechain.zoo.music.concepts import concept
from studies import known

module = importlib.import_module("sidechain.studies.steering.run")
NAMES = [f"transformer_blocks.{index}.attn2" for index in range(3)]
TABLES = ("readings.csv", "curves.csv", "scores.csv", "summary.json")


@pytest.fixture
def config(tmp_path):
    return st.SteeringConfig(
        out=tmp_path / "run",
        concept="drums",
        sites="cross:1",
        strengths=(-2.0, 0.0, 2.0, 4.0),
        prompts=3,
        steps=2,
        batch_rows=26,
    )


def vector_at(*sites, seed=0, steps=2):
    """A vector that is zero except at some sites."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for index, name in enumerate(NAMES):
        for branch in ("cond", "uncond"):
            value = torch.randn(steps, 16, generator=generator)
            tensors[name, branch] = value * (f"cross:{index}" in sites)
    return SteeringVector(tensors)


def clips(model, config, vector, rows):
    prompts = ["a flute solo", "a slow cello piece"]
    return module.generate_rows(config, model.subject, vector, ["cross:1"], prompts, rows).latents


def alike(first, second):
    """Equal but for rounding: a product's rows round differently by their place in the batch."""
    return torch.allclose(first, second, rtol=2e-5, atol=2e-5)


class TestRows:
    def test_strength_zero_is_the_unsteered_clip_bit_for_bit(self, model, config):
        rows = [
            module.Row(0, "none", 0.0),
            module.Row(0, "all", 8.0),
            module.Row(1, "none", 0.0),
            module.Row(1, "random", 8.0),
            module.Row(0, "localized", 0.0),
        ]
        found = clips(model, config, vector_at("cross:0", "cross:1", "cross:2"), rows)
        encoded = model.pipe.encode_prompt(["a flute solo", "a slow cello piece"])
        seeds = [common.noise_seed(0, row.prompt) for row in rows]
        plain = common.generate(
            model.pipe, encoded[[row.prompt for row in rows]], seeds, steps=2, guidance=3.0
        )
        for index, row in enumerate(rows):
            assert torch.equal(found[index], plain[index]) == (row.strength == 0.0), row

    def test_arms_touch_their_sites_only(self, model, config):
        arms = ("none", *st.ARMS)
        rows = [module.Row(0, arm, 0.0 if arm == "none" else 5.0) for arm in arms]
        inside = dict(zip(arms, clips(model, config, vector_at("cross:1"), rows), strict=True))
        assert alike(inside["ablated"], inside["none"])
        assert alike(inside["localized"], inside["all"])
        assert not alike(inside["localized"], inside["none"])
        assert not alike(inside["random"], inside["localized"])
        outside = clips(model, config, vector_at("cross:0", "cross:2"), rows)
        outside = dict(zip(arms, outside, strict=True))
        assert alike(outside["localized"], outside["none"])
        assert alike(outside["random"], outside["none"])  # of norm zero where it acts
        assert alike(outside["ablated"], outside["all"])

    def test_a_row_does_not_depend_on_its_batch(self, model, config):
        vector = vector_at("cross:1", "cross:2")
        rows = [module.Row(n, arm, 3.0) for n in (0, 1) for arm in st.ARMS]
        batch = clips(model, config, vector, rows)
        for index, row in enumerate(rows):
            alone = clips(model, config, vector, [row])
            torch.testing.assert_close(batch[index : index + 1], alone, rtol=1e-3, atol=1e-4)


class TestRun:
    def test_tables(self, model, config):
        found = st.run(config)
        table = pd.read_csv(config.out / "readings.csv")
        # per prompt: the clip of strength 0, then three strengths in four arms
        assert model.clips == 3 * 13
        assert len(table) == 2 * 3 * 13
        kept = [name for name in table if name.endswith("_kept")]
        assert kept == [
            f"{name}_kept" for name in ("instrument", "vocals", "tempo", "mood", "genre")
        ]
        plain = table[table.arm == "none"]
        assert (plain.distance == 0).all()
        assert (plain[kept] == 1).all(axis=None)
        steered = table[table.arm != "none"]
        assert (steered.distance > 0).all()
        assert table[kept].isin([0, 1]).all(axis=None)
        assert table.score.between(0, 1).all()
        assert table.text[0] == concept("drums").pairs(1, common.TEST_PROMPTS)[0].corrupted
        assert set(found.arms) == {"latent", "mel"}
        for scorer, arms in found.arms.items():
            assert list(arms) == list(st.ARMS)
            for curve in arms.values():
                assert curve.strength == [-2.0, 0.0, 2.0, 4.0]
                assert curve.distance[1].value == 0.0
            assert set(found.cutoff[scorer]) == {1, -1}
        curves = pd.read_csv(config.out / "curves.csv")
        assert len(curves) == 2 * 4 * 4
        summary = json.loads((config.out / "summary.json").read_text())
        assert summary["localized"] == ["cross:1"]
        assert summary["prompts"] == 3
        assert len(summary["scores"]) == 8
        made = SteeringVector.load(config.out / "vector.safetensors", model.pipe)
        assert made.concept == "drums"

    def test_far_steering_goes_far(self, model, config):
        found = st.run(replace(config, strengths=(0.0, 1.0, 16.0), arms=("all",)))
        for arms in found.arms.values():
            near, far = arms["all"].distance[1:]
            assert 0 < near.value < far.value

    def test_audio(self, model, config, monkeypatch):
        monkeypatch.setattr(
            type(model.pipe.codec), "audio", lambda self, mels: np.zeros((len(mels), 160), "f4")
        )
        st.run(replace(config, audio=True, strengths=(0.0, 2.0), prompts=1, arms=("all",)))
        files = sorted(path.name for path in (config.out / "audio").iterdir())
        assert files == ["000_all_2.flac", "000_none_0.flac"]
        wave, rate = soundfile.read(config.out / "audio" / files[0])
        assert (len(wave), rate) == (160, 16_000)

    def test_own_prompts_and_several_sites(self, model, config):
        found = st.run(
            replace(config, prompts=("a flute solo", "cello"), sites="cross:2,cross:0", seed=3)
        )
        assert found.localized == ["cross:0", "cross:2"]
        assert found.prompts == 2
        assert set(found.readings.text) == {"a flute solo", "cello"}

    def test_given_vector(self, model, config, tmp_path):
        path = tmp_path / "v.safetensors"
        vectors.run(vectors.VectorConfig(concept="vocals", out=path, pairs=2, steps=2))
        model.reset()
        found = st.run(replace(config, concept=None, vector=path, strengths=(0.0, 1.0)))
        assert found.concept.name == "vocals"
        assert not (config.out / "vector.safetensors").exists()
        # the same path with another vector in it is another run
        vectors.run(vectors.VectorConfig(concept="vocals", out=path, pairs=1, steps=2))
        with pytest.raises(ValueError, match=r"--out: expected a new folder"):
            st.run(replace(config, concept=None, vector=path, strengths=(0.0, 1.0)))

    def test_localized_sites_come_from_the_zoo(self, model, config, monkeypatch):
        import sidechain.zoo

        monkeypatch.setattr(sidechain.zoo, "localized", lambda name: ("cross:2", "cross:0"))
        found = st.run(replace(config, sites=None, prompts=1, strengths=(0.0, 1.0)))
        assert found.localized == ["cross:2", "cross:0"]


class TestContinue:
    def test_cut_off_run_gives_equal_tables(self, model, config, tmp_path):
        small = replace(config, batch_rows=13)
        whole = replace(small, out=tmp_path / "whole")
        st.run(whole)
        assert model.calls == 3  # one batch a prompt
        model.reset(stop_after=2)
        with pytest.raises(KeyboardInterrupt):
            st.run(small)
        vector = (small.out / "vector.safetensors").stat().st_mtime_ns
        model.reset()
        st.run(small)
        assert model.calls == 1
        assert (small.out / "vector.safetensors").stat().st_mtime_ns == vector
        for name in TABLES:
            assert (small.out / name).read_text() == (whole.out / name).read_text()
        model.reset(stop_after=0)
        st.run(small)
        with pytest.raises(ValueError, match=r"--out: expected a new folder or the same settings"):
            st.run(replace(small, strengths=(0.0, 1.0)))


BAD = {
    "neither": ({"concept": None}, r"steer: expected a concept or a vector file, got neither"),
    "concept": ({"concept": "oboe"}, r"concept: expected one of .*, got 'oboe'"),
    "site": ({"sites": "cross:5"}, r"sites: expected one of .*, got 'cross:5'"),
    "self": ({"sites": "self:1"}, r"steer: expected sites of cross:0-2 .*, got self:1"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_bad_settings_leave_no_folder(model, config, changes, message):
    with pytest.raises(ValueError, match=message):
        st.run(replace(config, **changes))
    assert not config.out.exists()


def test_vector_of_another_model(model, config, tmp_path):
    path = tmp_path / "other.safetensors"
    other = tiny_pipeline("music", layers=4)
    setup = vectors.VectorConfig(concept="drums", pairs=1, steps=1)
    vectors.build(models.MusicSubject(other), setup, progress=False).save(path)
    with pytest.raises(ValueError, match="config hash"):
        st.run(replace(config, vector=path))
    assert not config.out.exists()


class TestAnalyse:
    """Readings where distance is the strength and the score grows by a known slope."""

    def analysed(self, **options):
        return analyse.analyse(known.readings(**options), concept("drums"), ["cross:1"])

    def test_cutoff_is_the_smaller_reach_of_the_real_directions(self):
        assert self.analysed().cutoff == {"latent": {1: 3.0}, "mel": {1: 3.0}}

    def test_area_and_smoothness(self):
        arms = self.analysed().arms["latent"]
        # a line from 0 to slope x 3 over distance 0 to 3
        assert arms["localized"].auc == pytest.approx(0.2 * 3 * 3 / 2)
        assert arms["localized"].smoothness == pytest.approx(0.0, abs=1e-9)
        # at strength 1.5 the distance is 3: the area up to there
        assert arms["all"].auc == pytest.approx(0.1 * 1.5 * 3 / 2)

    def test_intervals_of_equal_prompts_are_points(self):
        curve = self.analysed().arms["mel"]["localized"]
        assert [i.value for i in curve.score] == pytest.approx([0.1, 0.3, 0.5, 0.7])
        assert curve.score[2].low == pytest.approx(curve.score[2].high)

    def test_operating_strength_keeps_the_instrument(self):
        assert self.analysed().operating_strength() == 3.0
        found = self.analysed(kept=lambda arm, strength: float(strength < 3))
        assert found.operating_strength() == 2.0
        assert found.arms["mel"]["localized"].best_point() == 2
        none = self.analysed(kept=lambda arm, strength: 0.0)
        assert none.operating_strength() is None
        assert none.score_table().best_score.isna().all()

    def test_undefined_scores_are_null_in_json(self, tmp_path):
        self.analysed(kept=lambda arm, strength: 0.0).write(tmp_path)
        text = (tmp_path / "summary.json").read_text()
        assert "NaN" not in text
        assert json.loads(text)["scores"][0]["best_score"] is None

    def test_what_is_kept(self):
        assert st.kept_attribute(concept("drums")) == "instrument"
        assert st.kept_attribute(concept("violin")) == "drums"

    def test_without_steered_rows(self):
        table = known.readings()
        found = analyse.analyse(table[table.arm == "none"], concept("drums"), ["cross:1"])
        assert found.arms == {"latent": {}, "mel": {}}
        assert found.operating_strength() is None

    def test_one_arm(self):
        table = known.readings()
        some = table[table.arm.isin(["none", "random"])]
        found = analyse.analyse(some, concept("drums"), ["cross:1"])
        assert found.cutoff["latent"] == {1: 27.0}
        assert not math.isnan(found.arms["latent"]["random"].auc)
