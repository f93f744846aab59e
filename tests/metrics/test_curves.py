# SPDX-License-Identifier: Apache-2.0
"""AUC and smoothness against the published tables, and against wrong readings of the definition."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidechain.metrics import curves
from sidechain.metrics.curve_table import (
    COLUMNS,
    read_sweeps,
    score_sweeps,
    undefined_directions,
)

ORACLES = Path(__file__).parents[1] / "data" / "oracles"
TOLERANCE = 0.0005 + 1e-6


@pytest.fixture(scope="module")
def table():
    return read_sweeps(ORACLES / "steering_piano.csv")


@pytest.fixture(scope="module")
def printed():
    with open(ORACLES / "steering_expected.csv", newline="") as stream:
        return {row["method"]: row for row in csv.DictReader(stream)}


def sweeps_of(table):
    methods = {}
    for row in table:
        methods.setdefault(row["method"], []).append(
            (row["alpha"], row["lpaps"], row["muqt"], row["clap"])
        )
    return {method: np.array(rows).T for method, rows in methods.items()}


def limits_of(sweeps, methods=("pci_all", "pci_loc")):
    return {
        sign: curves.cutoff([(sweeps[m][1], sweeps[m][0]) for m in methods], sign)
        for sign in (1, -1)
    }


def misses(values, printed, kind):
    """Count values further from print than rounding explains: values {(method, m): value}."""
    return sum(
        not abs(value - float(printed[method][f"{kind}_{m}"])) <= TOLERANCE
        for (method, m), value in values.items()
    )


def over_both(sweeps, limits, rule):
    values = {}
    for method, (alpha, x, muqt, clap) in sweeps.items():
        for name, m in (("muqt", muqt), ("clap", clap)):
            sides = [rule(curves.direction(x, m, alpha, s), limits[s]) for s in (1, -1)]
            values[method, name] = float(np.mean(sides))
    return values


class TestPublished:
    def test_all_sixty_values(self, table, printed):
        rows = score_sweeps(table)
        assert [row["method"] for row in rows] == list(printed)
        for row in rows:
            for column in COLUMNS[2:]:
                expected = float(printed[row["method"]][column])
                assert row[column] == pytest.approx(expected, abs=TOLERANCE), (row, column)

    def test_cutoffs(self, table):
        limits = limits_of(sweeps_of(table))
        assert limits[1] == pytest.approx(3.803909, abs=1e-9)
        assert limits[-1] == pytest.approx(3.491554, abs=1e-9)

    def test_order_of_rows_does_not_matter(self, table):
        shuffled = [table[i] for i in np.random.default_rng(3).permutation(len(table))]
        key = lambda row: row["method"]  # noqa: E731
        assert sorted(score_sweeps(shuffled), key=key) == sorted(score_sweeps(table), key=key)


class TestWrongReadingsShow:
    """Each plausible misreading leaves the print in as many places as the source says."""

    def test_no_boundary_point(self, table, printed):
        def rule(points, limit):
            kept = points.distance <= limit + 1e-9
            return np.trapezoid(points.gain[kept], points.distance[kept])

        sweeps = sweeps_of(table)
        assert misses(over_both(sweeps, limits_of(sweeps), rule), printed, "auc") == 21

    def test_clipped_gain(self, table, printed):
        def rule(points, limit):
            clipped = np.maximum(points.gain, 0)
            return curves.auc(curves.Direction(points.strength, points.distance, clipped), limit)

        sweeps = sweeps_of(table)
        assert misses(over_both(sweeps, limits_of(sweeps), rule), printed, "auc") == 14

    def test_one_cutoff_for_both_directions(self, table, printed):
        sweeps = sweeps_of(table)
        limits = dict.fromkeys((1, -1), min(limits_of(sweeps).values()))
        assert misses(over_both(sweeps, limits, curves.auc), printed, "auc") > 0

    def test_boundary_point_in_smoothness(self, table, printed):
        def rule(points, limit):
            kept = points.distance <= limit + 1e-9
            gain = points.gain[kept]
            if not kept.all():
                edge = np.interp(limit, points.distance, points.gain)
                gain = np.append(gain, edge)
            return np.std(np.diff(gain) / gain[: kept.sum()].max())

        sweeps = sweeps_of(table)
        assert misses(over_both(sweeps, limits_of(sweeps), rule), printed, "smooth") >= 24

    def test_sample_deviation(self, table, printed):
        def rule(points, limit):
            gain = points.gain[points.distance <= limit + 1e-9]
            return np.std(np.diff(gain) / gain.max(), ddof=1)

        sweeps = sweeps_of(table)
        assert misses(over_both(sweeps, limits_of(sweeps), rule), printed, "smooth") == 30

    def test_start_without_alpha_zero(self, table, printed):
        def rule(points, limit):
            gain = points.gain[points.distance <= limit + 1e-9][1:]
            return np.std(np.diff(gain) / gain.max())

        sweeps = sweeps_of(table)
        assert misses(over_both(sweeps, limits_of(sweeps), rule), printed, "smooth") == 26


class TestDefinition:
    """What the published data do not exercise."""

    def test_boundary_point_is_interpolated(self):
        points = curves.direction([0, 1, 3], [0, 2, 4], [0, 1, 2], 1)
        # up to x = 2: triangle to (1, 2), then the line towards (3, 4) is at 3
        assert curves.auc(points, 2.0) == pytest.approx(1.0 + 2.5)
        assert curves.smoothness(points, 2.0) == 0.0

    def test_stepping_back_subtracts(self):
        points = curves.direction([0, 2, 1], [0, 2, 2], [0, 1, 2], 1)
        assert curves.auc(points, 5.0) == pytest.approx(2.0 - 2.0)

    def test_points_within_the_cutoff_count_wherever_they_stand(self):
        # alpha 2 leaves the cut-off, alpha 3 is back inside: the edge is ordered before it
        points = curves.direction([0, 1, 3, 1.5], [0, 1, 3, 2], [0, 1, 2, 3], 1)
        edge = 2 + (3 - 2) * (2 - 1.5) / (3 - 1.5)
        expected = 0.5 + (1 + edge) / 2 + (1.5 - 2) * (edge + 2) / 2
        assert curves.auc(points, 2.0) == pytest.approx(expected)
        assert curves.smoothness(points, 2.0) == pytest.approx(np.std([0.5, 0.5]))

    def test_nothing_dropped_has_no_boundary(self):
        points = curves.direction([0, 1], [0, 1], [0, 1], 1)
        assert curves.auc(points, 9.0) == pytest.approx(0.5)

    def test_negative_direction_is_mirrored(self):
        x, m, alpha = [2, 1, 0], [-4, -1, 0], [-2, -1, 0]
        assert curves.auc(curves.direction(x, m, alpha, -1), 9.0) == pytest.approx(0.5 + 2.5)

    def test_undefined(self):
        lonely = curves.direction([0], [0.3], [0], 1)
        assert math.isnan(curves.auc(lonely, 1.0))
        assert math.isnan(curves.smoothness(lonely, 1.0))
        falling = curves.direction([0, 1], [0, -1], [0, 1], 1)
        assert math.isnan(curves.smoothness(falling, 1.0))
        assert curves.auc(falling, 1.0) == pytest.approx(-0.5)
        assert math.isnan(curves.auc(falling, math.nan))
        both = curves.score([0, 1], [0, 1], [0, 1], {1: 1.0, -1: 1.0})
        assert math.isnan(both.auc)
        assert both.auc_by_sign[1] == pytest.approx(0.5)
        assert curves.score([0, 1], [0, 1], [0, 1], {1: 1.0}).auc == pytest.approx(0.5)
        assert math.isnan(curves.cutoff([([0, 1], [0, 1])], -1))

    @given(
        st.lists(st.tuples(st.floats(0, 10), st.floats(-5, 5)), min_size=1, max_size=12),
        st.floats(0.1, 12),
        st.floats(0.1, 10),
    )
    def test_auc_scales_and_smoothness_does_not(self, points, limit, factor):
        x = [0.0, *(p[0] for p in points)]
        m = np.array([0.0, *(p[1] for p in points)])
        alpha = range(len(x))
        one = curves.direction(x, m, alpha, 1)
        more = curves.direction(x, factor * m, alpha, 1)
        assert curves.auc(more, limit) == pytest.approx(
            factor * curves.auc(one, limit), rel=1e-6, abs=1e-6
        )
        if one.gain[one.distance <= limit + 1e-9].max() > 1e-6:
            assert curves.smoothness(more, limit) == pytest.approx(
                curves.smoothness(one, limit), rel=1e-6, abs=1e-9
            )


def make_rows(methods=("pci_all", "pci_loc", "mine"), concepts=("cello",), alphas=(-1, 0, 1)):
    return [
        {
            "method": method,
            "concept": concept,
            "alpha": float(alpha),
            "lpaps": abs(float(alpha)),
            "muqt": float(alpha),
            "clap": 2.0 * alpha,
        }
        for concept in concepts
        for method in methods
        for alpha in alphas
    ]


class TestTable:
    def test_cutoff_is_per_concept(self):
        rows = make_rows(concepts=("cello", "flute"))
        for row in rows:
            if row["concept"] == "flute":
                row["lpaps"] *= 2
        scored = {(r["method"], r["concept"]): r for r in score_sweeps(rows)}
        assert scored["mine", "cello"]["auc_muqt"] == pytest.approx(0.5)
        assert scored["mine", "flute"]["auc_muqt"] == pytest.approx(1.0)
        assert scored["mine", "flute"]["auc_clap"] == pytest.approx(2.0)

    def test_other_cutoff_methods(self):
        rows = make_rows(methods=("mine", "yours"))
        with pytest.raises(ValueError, match=r"cello, got none of pci_all, pci_loc.*mine, yours"):
            score_sweeps(rows)
        assert len(score_sweeps(rows, cutoff=["yours"])) == 2

    def test_one_missing_cutoff_method_is_named(self):
        with pytest.raises(ValueError, match="got none of pci_loc"):
            score_sweeps(make_rows(methods=("pci_all", "mine")))

    def test_one_sided(self):
        rows = make_rows(alphas=(0, 1))
        assert all(math.isnan(row["auc_muqt"]) for row in score_sweeps(rows))
        assert undefined_directions(rows) == [
            "concept cello: no negative alpha for a cut-off method"
        ]
        assert score_sweeps(rows, directions="positive")[0]["auc_muqt"] == pytest.approx(0.5)

    def test_alignment_without_values_is_undefined(self):
        rows = [row | {"clap": math.nan} for row in make_rows()]
        assert math.isnan(score_sweeps(rows)[0]["auc_clap"])
        rows[0]["clap"] = 1.0
        with pytest.raises(ValueError, match=r"finite m.*pci_all, cello, clap"):
            score_sweeps(rows)

    def test_mean_over_defined_concepts(self):
        rows = make_rows(concepts=("cello", "flute"))
        for row in rows:
            if row["concept"] == "flute" and row["method"] == "mine":
                row["muqt"] = -row["muqt"]
        means = {r["method"]: r for r in score_sweeps(rows, mean=True) if r["concept"] == "mean"}
        assert means["mine"]["auc_muqt"] == pytest.approx(0.0)
        assert means["mine"]["smooth_muqt"] == pytest.approx(0.0)  # of cello alone

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"alpha": 2.0}, r"point at alpha 0, got -1, 2, 1 \(mine, cello"),
            ({"alpha": 1.0}, "every alpha once, got 1 twice"),
            ({"lpaps": 0.5}, "x = 0 at alpha 0, got 0.5"),
            ({"lpaps": -0.5}, "distances x >= 0, got -0.5"),
            ({"lpaps": math.inf}, "finite x, got inf"),
        ],
    )
    def test_bad_sweeps(self, change, match):
        rows = make_rows()
        rows[7].update(change)
        with pytest.raises(ValueError, match=match):
            score_sweeps(rows)

    def test_bad_options(self):
        with pytest.raises(ValueError, match="expected directions"):
            score_sweeps(make_rows(), directions="up")
        with pytest.raises(ValueError, match="at least one cut-off method"):
            score_sweeps(make_rows(), cutoff=[])


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: curves.direction([0, 1], [0], [0, 1], 1), r"one shape \[N\], got \[2\], \[1\]"),
        (lambda: curves.direction([0, 1], [0, 1], [0, 1], 2), "sign"),
        (lambda: curves.direction([0, 1], [0, np.nan], [0, 1], 1), "finite m"),
        (lambda: curves.direction([], [], [], 1), "point at alpha 0, got no points"),
        (lambda: curves.cutoff([], 1), "at least one reference"),
        (lambda: curves.score([0], [0], [0], {}), "cut-off"),
    ],
)
def test_bad_calls(call, match):
    with pytest.raises(ValueError, match=match):
        call()
