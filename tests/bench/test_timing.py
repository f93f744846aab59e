# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from bench.support import Sleeper, doubling
from sidechain.bench import cases, timing
from sidechain.bench.cases import Candidate
from sidechain.bench.machine import Machine


@pytest.fixture(scope="module")
def machine() -> Machine:
    return Machine("cpu", seconds=0.0)


class TestTiming:
    def test_median_and_percentiles(self) -> None:
        got = timing.side_by_side({"a": Sleeper(1.0, 2.0, 3.0, 4.0, 5.0)}, seconds=0.01)["a"]
        assert got.median == 3.0
        assert got.p20 < got.median < got.p80

    def test_a_slow_candidate_is_still_sampled(self) -> None:
        slow, quick = Sleeper(9.0), Sleeper(1.0)
        got = timing.side_by_side({"slow": slow, "quick": quick}, seconds=0.0)
        assert got["slow"].samples == got["quick"].samples == timing.LEAST

    def test_candidates_take_turns(self) -> None:
        order: list[str] = []

        class Noting(Sleeper):
            def __init__(self, name: str) -> None:
                super().__init__(1.0)
                self.name = name

            def sample(self) -> float:
                order.append(self.name)
                return super().sample()

        timing.side_by_side({n: Noting(n) for n in "ab"}, seconds=0.0)
        assert order.index("b") < len(order) - 1 - order[::-1].index("a"), "a was done before b"

    def test_clock_rotates_buffers(self) -> None:
        seen: list[int] = []
        sampler = timing.ClockSampler([lambda i=i: seen.append(i) for i in range(3)])
        assert seen[:3] == [0, 1, 2]
        assert 0 < sampler.sample() < 1e-3
        assert seen[4:7] == [0, 1, 2]

    def test_short_calls_fill_a_sample(self) -> None:
        count = 0

        def call() -> None:
            nonlocal count
            count += 1

        sampler = timing.ClockSampler([call])
        count = 0
        sampler.sample()
        assert count >= 100


class TestMachine:
    def test_limits_are_positive_and_ordered(self, machine: Machine) -> None:
        facts = machine.facts()
        assert facts["limits"]["copy_gbytes_per_s"] > 0.1
        assert facts["limits"]["f32_matrix_tflops"] > 0
        assert facts["threads"] == torch.get_num_threads()

    def test_floor_names_what_binds(self, machine: Machine) -> None:
        rate = machine.matrix_rates["f32"]
        assert machine.floor(2.0, round(rate), "f32") == (2.0, "memory")
        seconds, bound = machine.floor(0.1, round(rate), "f32")
        assert bound == "matrix"
        assert seconds == pytest.approx(1.0, rel=1e-6)
        assert machine.floor(0.5, 0, "f32") == (0.5, "memory")

    def test_copy_is_as_large_as_the_work(self, machine: Machine) -> None:
        assert machine.copy_size(100_000) == 100_000
        assert machine.copy_size(1) == 4096
        assert machine.copy_size(2**40) == 2**28

    def test_slug_is_a_file_name(self, machine: Machine) -> None:
        assert set(machine.slug) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
    def test_no_gpu_is_one_line(self) -> None:
        with pytest.raises(RuntimeError, match="bench: expected a CUDA device"):
            Machine("cuda")


class TestCases:
    def test_rows(self, machine: Machine) -> None:
        rows = cases.run_case(doubling(), machine, seconds=0.0)
        assert [(r.provider, r.kind) for r in rows] == [("eager", "plain"), ("cpu", "ours")]
        assert rows[0].times_plain == 1.0
        assert rows[1].facts == {"recall": 1.0}
        assert all(r.median_us and r.share and r.bound == "memory" for r in rows)
        assert rows[1].times_compiled is None

    def test_a_failing_peer_keeps_its_row(self, machine: Machine) -> None:
        def broken(_: object) -> None:
            raise RuntimeError("needs\nanother compiler")

        rows = cases.run_case(
            doubling(extra=(Candidate("compile", broken, "compiled"),)), machine, seconds=0.0
        )
        assert rows[1].failed == "RuntimeError: needs another compiler"
        assert rows[1].median_us is None
        assert rows[2].median_us

    def test_ours_must_be_right(self, machine: Machine) -> None:
        with pytest.raises(AssertionError, match="cpu: expected twice"):
            cases.run_case(doubling(ours=list), machine, seconds=0.0)

    def test_ratios_are_to_the_best(self) -> None:
        rows = [
            cases.Row("c", "f32", name, kind, 0, 0, median_us=us)
            for name, kind, us in [
                ("eager", "plain", 8.0), ("bag", "plain", 4.0), ("compile", "compiled", 3.0),
                ("cpu", "ours", 2.0), ("gone", "peer", None),
            ]
        ]  # fmt: skip
        cases.compare_rows(rows)
        assert [r.times_plain for r in rows] == [0.5, 1.0, 1.33, 2.0, None]
        assert rows[3].times_compiled == 1.5
