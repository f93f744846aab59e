# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest

from sidechain.metrics import impact as im
from sidechain.metrics.impact_table import (
    incomplete_sites,
    mean_impacts,
    read_impacts,
)

ORACLES = Path(__file__).parents[1] / "data" / "oracles"


class TestPublished:
    def test_means_and_order(self):
        rows = mean_impacts(read_impacts(ORACLES / "localization_impact.csv"))
        with open(ORACLES / "localization_expected.csv", newline="") as stream:
            printed = list(csv.DictReader(stream))
        assert [row["block"] for row in rows] == [row["block"] for row in printed]
        for row, expected in zip(rows, printed, strict=True):
            assert row["mean_impact"] == pytest.approx(float(expected["impact"]), abs=0.0005 + 1e-6)

    def test_functional_sites(self):
        table = read_impacts(ORACLES / "localization_impact.csv")
        chosen = [row["block"] for row in mean_impacts(table) if row["functional"]]
        assert chosen == ["tf7", "tf6"]
        wider = [row["block"] for row in mean_impacts(table, tau=0.05) if row["functional"]]
        assert wider == ["tf7", "tf6", "tf5"]


class TestImpact:
    def test_ratio_floor_and_no_cap(self):
        values = im.impact([0.3, 0.1, 0.0, 0.6], 0.1, 0.5)
        np.testing.assert_allclose(values, [0.5, 0.0, 0.0, 1.25])

    def test_batched_over_concepts(self):
        site = np.array([[0.2, 0.4], [0.0, 1.0]])
        np.testing.assert_allclose(im.impact(site, [0.0, 0.5], [0.4, 1.0]), [[0.5, 1], [0, 1]])

    def test_no_effect_is_undefined(self):
        assert np.isnan(im.impact([0.3], 0.5, 0.5)).all()
        assert np.isnan(im.impact([0.3], 0.5, 0.2)).all()

    def test_mean_leaves_out_the_undefined(self):
        means = im.mean_impact([[0.2, np.nan, np.nan], [0.4, 0.6, np.nan]])
        np.testing.assert_allclose(means, [0.3, 0.6, np.nan])

    def test_threshold_is_reached_exactly(self):
        assert list(im.functional([np.mean([0.1] * 10), 0.0999, np.nan])) == [True, False, False]

    def test_ranking(self):
        assert im.ranking([0.1, np.nan, 0.5, 0.1]) == [2, 0, 3, 1]

    def test_windows(self):
        assert im.windows(["a", "b", "c"], 2) == [("a", "b"), ("b", "c")]
        assert im.windows(["a", "b"], 2) == [("a", "b")]


class TestCumulative:
    def test_needed(self):
        curve = im.cumulative(["b", "a", "c"], [0.1, 0.4, 0.56, 0.6], 0.1, 0.6)
        np.testing.assert_allclose(curve.effect, [0, 0.6, 0.92, 1])
        assert curve.needed == 2
        assert im.cumulative(["b"], [0.0, 0.5], 0.0, 1.0).needed is None


class TestStability:
    def test_agreement(self):
        result = im.rank_stability([[3, 2, 1], [30, 20, 10], [1, 2, 3]])
        assert result.pairs[0] == (0, 1, pytest.approx(1.0))
        assert result.lowest == pytest.approx(-1.0)
        assert result.mean == pytest.approx(-1 / 3)

    def test_constant_is_undefined(self):
        assert math.isnan(im.rank_stability([[1, 1], [1, 2]]).mean)


def rows(**changes):
    row = {"model": "m", "metric": "s", "concept": "c", "block": "b0", "attn": "0", "impact": 0.5}
    return [row, row | changes]


class TestTable:
    def test_models_stay_apart(self):
        table = [*rows(block="b1", impact=0.7), *rows(model="n", block="b2", impact=0.9)[1:]]
        assert [(r["model"], r["block"]) for r in mean_impacts(table)] == [
            ("m", "b1"),
            ("m", "b0"),
            ("n", "b2"),
        ]

    def test_undefined_impacts_come_last(self):
        table = mean_impacts(rows(block="b1", impact=math.nan))
        assert math.isnan(table[-1]["mean_impact"])
        assert table[-1]["functional"] is False

    def test_repeated_concept(self):
        with pytest.raises(ValueError, match=r"one row per .*c twice for m b0 0.*--metric"):
            mean_impacts(rows(metric="t"))
        assert mean_impacts(rows(metric="t", impact=0.7), metric="t")[0]["mean_impact"] == 0.7

    def test_incomplete_sites(self):
        assert incomplete_sites(rows(block="b1", concept="d")) == [
            "m b0 0: no row for d",
            "m b1 0: no row for c",
        ]
        assert incomplete_sites(rows(block="b1")) == []


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: im.impact([1.0], [0.0], 1.0), r"expected site \[..., L\].*got \[1\], \[1\], \[\]"),
        (lambda: im.mean_impact([1.0]), r"impacts \[C, L\], got \[1\]"),
        (lambda: im.functional([1.0], math.nan), "finite tau, got nan"),
        (lambda: im.windows(["a"], 0), "size 1 to 1"),
        (lambda: im.windows(["a"], 2), "got 2"),
        (lambda: im.cumulative(["a"], [0.0], 0.0, 1.0), r"scores \[L \+ 1\] with L=1"),
        (lambda: im.cumulative(["a"], [0.0, 1.0], 1.0, 1.0), "every > none"),
        (lambda: im.rank_stability([[1, 2]]), "K, L >= 2"),
        (lambda: im.spearman([1, 2], [1, 2, 3]), "two vectors"),
        (lambda: mean_impacts(rows(block="b1"), metric="x"), "metric s, got 'x'"),
        (lambda: mean_impacts(rows(block="b1"), tau=math.inf), "finite tau"),
    ],
)
def test_bad_calls(call, match):
    with pytest.raises(ValueError, match=match):
        call()
