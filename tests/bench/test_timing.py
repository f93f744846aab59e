# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.support import Sleeper, doubling
from sidechain import _native
from sidechain.bench import cases, timing
from sidechain.bench.cases import Candidate
from sidechain.bench.machine import Machine, card, isa_of


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


class Fake:
    """Samplers of a GPU that is not there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: float, error: str = "") -> None:
        self.graphs: list[int] = []
        monkeypatch.setattr(timing, "EventSampler", lambda calls: Sleeper(seconds))
        monkeypatch.setattr(timing, "GraphSampler", self.graph)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        self.error = error

    def graph(self, calls: Any, repeats: int = 64) -> Any:
        self.graphs.append(repeats)
        if self.error:
            raise RuntimeError(self.error)
        found = Sleeper(1.0)
        found.method, found.capture = "graph", "captured"
        return found


class TestCapture:
    def test_a_failed_capture_says_why(self, monkeypatch: pytest.MonkeyPatch) -> None:
        Fake(monkeypatch, 1e-6, "operation not permitted\nwhen stream is capturing")
        found = timing.sampler([lambda: None], "cuda")
        assert found.capture.startswith("failed: RuntimeError: operation not permitted when")
        assert found.method != "graph"

    def test_a_promise_is_tried_whatever_a_call_lasts(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fake = Fake(monkeypatch, 1.0)
        assert timing.sampler([lambda: None], "cuda").capture == ""
        assert fake.graphs == []
        long = timing.sampler([lambda: None] * 3, "cuda", promised=True)
        assert (long.capture, fake.graphs) == ("captured", [1])
        assert long.method != "graph", "a long call is timed by events"

    def test_short_calls_are_replayed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        Fake(monkeypatch, 1e-6)
        assert timing.sampler([lambda: None], "cuda").method == "graph"

    @pytest.mark.parametrize(
        ("waits", "provider", "broken"),
        [
            ("", "cuda", "capture failed: RuntimeError: no"),
            ("reads a count", "cuda", ""),
            ("", "reference", ""),
        ],
    )
    def test_a_promise_that_is_broken_fails_the_row(
        self, waits: str, provider: str, broken: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        Fake(monkeypatch, 1e-6, "no")
        machine = Machine("cpu")
        machine.device = "cuda"
        monkeypatch.setattr(machine, "copy_sampler", lambda moved: Sleeper(1.0))
        monkeypatch.setattr(cases, "_rotations", lambda case, device: 1)
        monkeypatch.setattr(cases.profile, "kernels", lambda call: [("tap_kernel", 2e6)])
        case = replace(doubling(), waits=waits)
        ours = replace(case.candidates[-1], name=provider)
        rows = cases.run_case(replace(case, candidates=(ours,)), machine, seconds=0.0)
        (row,) = rows
        assert row.broken == broken
        assert row.capture.startswith("failed" if broken else "not promised")
        assert row.median_us, "it is timed all the same"
        assert row.kernels[0][:2] == ["tap_kernel", 2e6]
        floor = 4096 / machine.largest
        assert row.kernels[0][2] == pytest.approx(2.0 / floor, rel=1e-3)


class TestProfile:
    def test_names_lose_what_says_little(self) -> None:
        name = "void sidechain::cuda::(anonymous namespace)::tap_kernel<float, 4>(int, float*)"
        assert cases.profile.short(name) == "tap_kernel<float, 4>"
        assert cases.profile.short("screen_kernel") == "screen_kernel"


CPU = "processor : 0\nmodel name : A\nflags\t\t: fpu {}\n\nprocessor : 1\n"
AVX2 = "avx2 fma f16c"
AVX512 = f"{AVX2} avx512f avx512bw avx512dq avx512vl avx512_vnni"


class TestMachine:
    @pytest.mark.parametrize(
        ("flags", "cap", "isa"),
        [
            (AVX512, None, "avx512"),
            (AVX512.replace("avx512_vnni", ""), None, "avx2"),
            (AVX512, "avx2", "avx2"),
            (AVX2, None, "avx2"),
            (AVX2, "avx512", "avx2"),
            ("avx2 fma", None, "baseline"),
            (AVX512, "nonsense", "avx512"),
        ],
    )
    def test_instruction_set_of_a_processor(self, flags: str, cap: str | None, isa: str) -> None:
        assert isa_of(CPU.format(flags), cap or "") == isa

    @pytest.mark.skipif(_native.host() is None, reason="no module that names its choice")
    def test_both_ways_to_name_it_agree(self, monkeypatch: pytest.MonkeyPatch) -> None:
        named = Machine("cpu").isa
        monkeypatch.setattr(_native, "host", lambda: None)
        assert Machine("cpu").isa == named

    def test_a_card_that_cannot_be_asked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        properties = SimpleNamespace(uuid="1")
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
        monkeypatch.setenv("PATH", "")
        assert "nvidia-smi" in card()["card"]["unknown"]

    def test_a_card_is_asked_and_never_set(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        properties = SimpleNamespace(uuid="1")
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
        script = tmp_path / "nvidia-smi"
        script.write_text(f'#!/bin/sh\necho "$@" >{tmp_path}/asked\necho H100, 580.1{", 1" * 7}\n')
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
        assert card()["card"]["driver_version"] == "580.1"
        words = (tmp_path / "asked").read_text().split()
        assert [word for word in words if word.startswith("-")][1:] == [
            "--format=csv,noheader,nounits", "-i"
        ]  # fmt: skip

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

    def test_what_is_wrong_of_ours_is_a_row_and_the_rest_is_timed(self, machine: Machine) -> None:
        eager, cpu = cases.run_case(doubling(ours=list), machine, seconds=0.0)
        assert cpu.failed == "AssertionError: cpu: expected twice the numbers"
        assert cpu.broken == cpu.failed
        assert cpu.median_us is None
        assert eager.median_us
        assert not eager.broken

    def test_a_call_that_breaks_while_it_is_timed(self, machine: Machine) -> None:
        calls: list[int] = []

        def breaking(numbers: list[float]) -> list[float]:
            calls.append(1)
            if len(calls) > 40:
                raise RuntimeError("gone")
            return [2 * n for n in numbers]

        rows = cases.run_case(doubling(ours=breaking), machine, seconds=0.0)
        assert [row.failed for row in rows] == ["timing: RuntimeError: gone"] * 2

    def test_arguments_that_cannot_be_made(self, machine: Machine) -> None:
        case = replace(doubling(), make=lambda seed: [][seed])
        rows = cases.run_case(case, machine, seconds=0.0)
        assert all(row.failed.startswith("arguments: IndexError") for row in rows)

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
