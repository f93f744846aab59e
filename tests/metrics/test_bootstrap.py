# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from sidechain.metrics import bootstrap as bs
from sidechain.metrics.impact import impact, rank_stability


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def localization(rng, units=40, strength=(0.8, 0.3, 0.0), noise=0.1):
    none = rng.normal(0.1, noise, units)
    every = none + rng.normal(0.6, noise, units)
    site = np.stack([none + s * (every - none) + rng.normal(0, 0.05, units) for s in strength])
    return bs.ConceptScores(site, none, every)


class TestMeans:
    def test_agrees_with_scipy(self, rng):
        values = rng.normal(2, 1, 60)
        own = bs.mean_interval(values, resamples=4000, seed=1)
        other = stats.bootstrap(
            (values,), np.mean, method="percentile", n_resamples=4000, rng=np.random.default_rng(2)
        ).confidence_interval
        assert own.value == pytest.approx(values.mean())
        assert own.low == pytest.approx(other.low, abs=0.02)
        assert own.high == pytest.approx(other.high, abs=0.02)
        assert own.n == 60

    def test_covers(self, rng):
        hits = 0
        for trial in range(200):
            interval = bs.mean_interval(rng.normal(1, 2, 50), resamples=300, seed=trial)
            hits += interval.low <= 1 <= interval.high
        assert hits / 200 > 0.88

    def test_seed(self, rng):
        values = rng.normal(size=20)
        assert bs.mean_interval(values, seed=5) == bs.mean_interval(values, seed=5)
        assert bs.mean_interval(values, seed=5) != bs.mean_interval(values, seed=6)

    def test_chunks_do_not_change_the_result(self, rng, monkeypatch):
        values = rng.normal(size=20)
        whole = bs.mean_interval(values, resamples=100)
        monkeypatch.setattr(bs, "CHUNK", 20 * 7)
        assert bs.mean_interval(values, resamples=100) == whole

    def test_one_unit_has_no_width(self):
        assert bs.mean_interval([3.0]) == bs.Interval(3.0, 3.0, 3.0, 1)


class TestPaired:
    def test_pairing_removes_shared_noise(self, rng):
        shared = rng.normal(0, 10, 50)
        interval = bs.difference_interval(shared + 1, shared)
        assert interval.value == pytest.approx(1)
        assert interval.high - interval.low < 1e-9

    def test_ratio(self, rng):
        denominator = rng.uniform(1, 2, 80)
        interval = bs.ratio_interval(0.5 * denominator, denominator)
        assert interval.low == pytest.approx(0.5)
        assert interval.high == pytest.approx(0.5)
        assert math.isnan(bs.ratio_interval([1.0, 1.0], [0.0, 0.0]).value)


class TestProportions:
    def test_wilson(self):
        # closed form: (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)
        z, n, p = stats.norm.ppf(0.975), 48, 43 / 48
        middle, spread = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
        interval = bs.proportion_interval(43, 48)
        assert interval.low == pytest.approx((middle - spread) / (1 + z**2 / n))
        assert interval.high == pytest.approx((middle + spread) / (1 + z**2 / n))

    def test_ends(self):
        assert bs.proportion_interval(0, 10).low == pytest.approx(0, abs=1e-12)
        assert bs.proportion_interval(0, 10).high > 0.2
        assert bs.proportion_interval(10, 10).high == pytest.approx(1)


class TestImpact:
    def test_recovers_planted_impacts(self, rng):
        scores = localization(rng)
        intervals = bs.impact_intervals(scores)
        point = impact(scores.site.mean(-1), scores.none.mean(), scores.every.mean())
        assert [i.value for i in intervals] == pytest.approx(list(point))
        for interval, truth in zip(intervals, (0.8, 0.3, 0.0), strict=True):
            assert interval.low <= truth + 0.03
            assert truth - 0.03 <= interval.high
            assert interval.high - interval.low < 0.15

    def test_mean_over_concepts(self, rng):
        concepts = [localization(rng, 30), localization(rng, 50, (0.4, 0.1, 0.0))]
        intervals = bs.mean_impact_intervals(concepts)
        singles = [bs.impact_intervals(concept) for concept in concepts]
        for site, interval in enumerate(intervals):
            mean = np.mean([single[site].value for single in singles])
            assert interval.value == pytest.approx(mean)
            assert interval.low <= interval.value <= interval.high
            assert interval.n == 80

    def test_no_effect_is_undefined(self):
        flat = bs.ConceptScores(np.ones((2, 4)), np.ones(4), np.ones(4))
        assert all(math.isnan(i.value) and math.isnan(i.low) for i in bs.impact_intervals(flat))

    def test_rank_stability(self, rng):
        runs = [[localization(rng), localization(rng)] for _ in range(3)]
        interval = bs.rank_stability_interval(runs, resamples=100)
        means = [
            np.mean([[i.value for i in bs.impact_intervals(c)] for c in run], axis=0)
            for run in runs
        ]
        assert interval.value == pytest.approx(rank_stability(means).mean)
        assert interval.low <= interval.value <= interval.high + 1e-12
        assert interval.low > 0.4


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: bs.mean_interval([]), r"units \[P\] with P >= 1"),
        (lambda: bs.mean_interval([[1.0]]), r"one value per unit \[P\], got \[1, 1\]"),
        (lambda: bs.mean_interval([np.nan]), "finite values"),
        (lambda: bs.mean_interval([1.0], level=1.0), "0 < level < 1"),
        (lambda: bs.mean_interval([1.0], resamples=0), "resamples >= 1"),
        (lambda: bs.difference_interval([1.0], [1.0, 2.0]), r"same units.*got \[1, 2\]"),
        (lambda: bs.proportion_interval(3, 2), "got 3 of 2"),
        (lambda: bs.proportion_interval(0, 0), "trials >= 1"),
        (
            lambda: bs.impact_intervals(bs.ConceptScores([1.0], [1.0], [1.0])),
            r"site \[L, P\].*got \[1\]",
        ),
        (
            lambda: bs.mean_impact_intervals(
                [
                    bs.ConceptScores([[1.0]], [0.0], [1.0]),
                    bs.ConceptScores([[1.0], [1.0]], [0.0], [1.0]),
                ]
            ),
            "one number of sites",
        ),
        (lambda: bs.rank_stability_interval([[]]), "at least 2 runs"),
    ],
)
def test_bad_calls(call, match):
    with pytest.raises(ValueError, match=match):
        call()
