# SPDX-License-Identifier: Apache-2.0
"""Hooks, taps and nnsight around the same calls: what is compared computes the same."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from sidechain.bench import hooks, timing
from sidechain.bench.hooks import compiled, site, step, ways
from sidechain.bench.machine import Machine
from sidechain.bench.timing import Turns


class TestTurns:
    def test_what_is_added_is_free_of_drift(self) -> None:
        # The machine gets three times slower; medians over all samples would say 5.5 s.
        bare = Turns(((1.0, 1.2, 0.9), (3.0,), (5.0, 5.0)), "clock")
        more = Turns(((1.5,), (3.5,), (9.0, 5.5, 2.0)), "clock")
        assert more.added(bare) == pytest.approx(0.5)
        assert bare.timing.median == pytest.approx(2.1) and bare.timing.samples == 6

    def test_each_way_is_attached_only_for_its_turn(self) -> None:
        attached: list[str] = []
        turns: list[str] = []
        met: list[list[str]] = []

        def way(name: str) -> Any:
            @contextlib.contextmanager
            def around() -> Iterator[timing.Call]:
                attached.append(name)
                turns.append(name)
                yield lambda: met.append(list(attached))
                attached.remove(name)

            return around

        taken = timing.in_turns({"a": way("a"), "b": way("b")}, "cpu", 0.0, rounds=3)
        assert turns == ["a", "b", "b", "a", "a", "b"]
        assert all(len(each) == 1 for each in met)
        assert [len(taken[name].rounds) for name in "ab"] == [3, 3]


@pytest.fixture
def place() -> site.Site:
    with torch.inference_mode():
        return site.Site("zoo-R16-T65-C160", Machine("cpu", quick=True))


class TestSite:
    def test_a_hook_that_does_something_else_is_refused(
        self, place: site.Site, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def weaker(number: int, out: torch.Tensor) -> torch.Tensor:
            place.pool(number, out)
            out[place.cond] += 1.99 * place.direction
            return out

        monkeypatch.setattr(place, "pool_and_add", weaker)
        with torch.inference_mode(), pytest.raises(AssertionError, match="not close"):
            place.check()

    def test_a_mean_of_other_rows_is_refused(
        self, place: site.Site, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def other(_number: int, out: torch.Tensor) -> None:
            place.seen[:] = [out[: place.samples].mean(1)]

        monkeypatch.setattr(place, "pool", other)
        with torch.inference_mode(), pytest.raises(AssertionError, match="not close"):
            place.check()

    def test_rows(self) -> None:
        (table,) = hooks.rows(Machine("cpu", quick=True), only="zoo-R16", seconds=0.0, quick=True)
        assert [row.provider for row in table] == ["bare", *site.KINDS]
        for row in table:
            if row.kind == "peer" and ways.nnsight_absent():
                assert row.failed == ways.nnsight_absent() and row.median_us is None
            else:
                assert row.median_us and not row.failed


class TestStep:
    def test_hooks_at_another_step_are_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with torch.inference_mode():
            steps = step.Steps(step.QUICK["step-tiny-R2"]("cpu"))
            by_hooks = steps.by_hooks

            @contextlib.contextmanager
            def late() -> Iterator[timing.Call]:
                tables, steps.tables = steps.tables, [t.roll(1, 0) for t in steps.tables]
                with by_hooks() as call:
                    yield call
                steps.tables = tables

            steps.check()
            monkeypatch.setattr(steps, "by_hooks", late)
            with pytest.raises(AssertionError, match="not close"):
                steps.check()

    def test_generations_follow_each_other(self) -> None:
        with torch.inference_mode():
            steps = step.Steps(step.QUICK["step-tiny-R2"]("cpu"))
            with steps.by_taps() as call:
                for _ in range(step.STEPS):
                    call()
                first = steps.captured.tracker.generation
                assert steps.captured.steps == tuple(range(step.STEPS))
                call()
                second = steps.captured.tracker.generation
            assert first is not None and second is not None
            assert second.number == first.number + 1 and second.steps == step.STEPS

    @pytest.mark.slow
    def test_compiled_steps_are_made_once(self) -> None:
        machine = Machine("cpu", quick=True)
        (rows,) = hooks.rows(machine, only="compiled-tiny", seconds=0.0, quick=True)
        assert [row.provider for row in rows] == [compiled.NOTHING, *compiled.KINDS]
        assert rows[-1].facts["recompiled"] == 0


def test_unknown_case() -> None:
    with pytest.raises(ValueError, match=r"part of the name of a case \[zoo-R16-T65-C160, step-"):
        next(hooks.rows(Machine("cpu", quick=True), only="x9", quick=True))
