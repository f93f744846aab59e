# SPDX-License-Identifier: Apache-2.0
"""Sweeps in one batch beside plain hooks: what is compared computes the same."""

from __future__ import annotations

import pytest
import torch

from sidechain import zoo
from sidechain.bench import sharing
from sidechain.bench.machine import Machine


class TestMeasured:
    def test_ratios_are_of_the_shared_batch(self) -> None:
        def slow() -> torch.Tensor:
            for _ in range(200):
                torch.randn(100, 100) @ torch.randn(100, 100)
            return torch.ones(3)

        rows = sharing._measured("case", {"shared": lambda: torch.ones(3), "hooks": slow}, 0.0)
        assert [row.provider for row in rows] == ["shared", "hooks"]
        assert [row.kind for row in rows] == ["ours", "plain"]
        assert rows[0].facts["x shared"] == 1.0
        assert rows[1].facts["x shared"] > 3.0
        assert all(0 < row.p20_us <= row.median_us <= row.p80_us for row in rows)

    def test_other_results_are_refused(self) -> None:
        ways = {"shared": lambda: torch.ones(3), "hooks": lambda: torch.tensor([1.0, 1.0, 1.01])}
        with pytest.raises(
            AssertionError, match=r"case, hooks: expected the latents of .* difference of 1"
        ):
            sharing._measured("case", ways, 0.0)


class TestRows:
    def test_localization_agrees_with_hooks_and_the_published_protocol(self) -> None:
        pipe, scorers = zoo.music(), zoo.scorers()
        pipe.set_progress_bar_config(disable=True)
        ways = sharing.Localize(pipe, scorers, steps=2).ways
        results = {name: way() for name, way in ways.items()}
        assert list(results) == ["shared", "hooks", "hooks, published protocol"]
        for found in results.values():
            assert (found - results["shared"]).norm() <= 2e-5 * results["shared"].norm()
        assert not torch.equal(results["shared"][0], results["shared"][-1])

    def test_rows_of_a_sweep(self) -> None:
        (table,) = sharing.rows(Machine("cpu"), only="strength", seconds=0.0, quick=True)
        assert [row.provider for row in table] == ["shared", "hooks"]
        assert {row.case for row in table} == {"strength sweep, 2 strengths"}

    def test_unknown_sweep(self) -> None:
        with pytest.raises(ValueError, match=r"expected part of the name of a sweep .*, got 'x9'"):
            next(sharing.rows(Machine("cpu"), only="x9"))
