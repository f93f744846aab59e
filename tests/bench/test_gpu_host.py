# SPDX-License-Identifier: Apache-2.0
"""What `bench/gpu.sh run` does on a GPU host, tried without one."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gpu_host import __main__ as program
from gpu_host import plan, session, work
from ops.support import need_kernel
from sidechain.bench import ops, results, small, warm
from sidechain.bench.cases import Candidate

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(session, "RESULTS", tmp_path / "committed")
    monkeypatch.setattr(results, "commit", lambda: "abc")
    return lambda out="out", **more: session.Session("cpu", tmp_path / out, 100.0, **more)


class Work:
    """Units that note when they ran."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.limits: list[float] = []
        self.status = {"b": "failed with exit code 1"}

    def unit(self, op: str, section: str = "correctness") -> plan.Unit:
        def run(session: Any, section: str, op: str, limit: float) -> str:
            self.ran.append(op)
            self.limits.append(limit)
            if self.status.get(op) == "raise":
                raise RuntimeError("of the harness")
            return session.store(section, op, {"status": self.status.get(op, "passed")})

        return plan.Unit(section, op, 30.0, run)


class TestPlan:
    def test_every_call_fits_a_command(self) -> None:
        assert sorted(plan.CALLS) == [1, 2, 3]
        for number, units in plan.CALLS.items():
            total = sum(unit.seconds for unit in units)
            assert total < plan.LIMIT <= 520, f"call {number}: {total}"
            assert f"call {number}: {total:.0f} s at most" in plan.text()

    def test_every_op_is_proved_and_timed(self) -> None:
        every = {(u.section, u.op) for units in plan.CALLS.values() for u in units}
        assert len(every) == sum(map(len, plan.CALLS.values())), "a unit stands twice"
        for module in ops.modules():
            assert {("correctness", module.OP), ("ops", module.OP)} <= every
        assert {("sae", part) for part in ("steps", "encode", "memory")} <= every
        assert {("sanitizer", tool) for tool in ("memcheck", "racecheck")} <= every

    def test_words(self) -> None:
        assert plan.chosen(["2"]) == plan.CALLS[2]
        assert [u.op for u in plan.chosen(["sanitizer"])] == ["memcheck", "racecheck"]
        assert len(plan.chosen(["1", "tests"])) == len(plan.CALLS[1])
        assert len(plan.chosen([])) == sum(map(len, plan.CALLS.values()))
        with pytest.raises(ValueError, match=r"calls and sections of 1, 2, 3, .*got 'no'"):
            plan.chosen(["no"])

    def test_every_section_is_named_in_the_script(self) -> None:
        named = (ROOT / "bench" / "gpu.sh").read_text()
        for section in plan.sections():
            assert section in named


class TestResume:
    def test_failed_units_run_again_and_good_ones_do_not(self, make: Any) -> None:
        work, here = Work(), make()
        units = [work.unit(op) for op in "abc"]
        assert program.run(here, units) == ["correctness b: failed with exit code 1"]
        work.status = {}
        assert program.run(here, units) == []
        assert work.ran == ["a", "b", "c", "b"]
        here.again = True
        program.run(here, units[:1])
        assert work.ran[-1] == "a"

    def test_a_fault_of_the_harness_stops_no_other_unit(self, make: Any) -> None:
        work, here = Work(), make()
        work.status = {"a": "raise"}
        bad = program.run(here, [work.unit("a"), work.unit("b")])
        assert bad == ["correctness a: failed: RuntimeError: of the harness"]
        assert here.stored("correctness", "a")["status"].startswith("failed: RuntimeError")
        assert here.done("correctness", "b")
        assert here.stored("correctness", "b")["seconds"] >= 0

    def test_ceilings_are_measured_in_every_call(self, make: Any) -> None:
        work, here = Work(), make()
        for _ in range(2):
            program.run(here, [work.unit("a", "machine"), work.unit("b", "warm")])
        assert work.ran == ["a", "b", "a", "b"]

    def test_another_commit_runs_everything(self, make: Any, monkeypatch: Any) -> None:
        work, here = Work(), make()
        program.run(here, [work.unit("a")])
        monkeypatch.setattr(results, "commit", lambda: "def")
        program.run(make(), [work.unit("a")])
        assert work.ran == ["a", "a"]
        assert [r["commit"] for r in results.read(here.path)] == ["def"]

    def test_nothing_starts_when_the_time_is_spent(self, make: Any) -> None:
        work, here = Work(), make()
        here.until = time.monotonic() + 4
        bad = program.run(here, [work.unit("a")])
        assert (bad, work.ran) == (["correctness a: not started"], [])
        assert "run 1  (continues" in program.advice(here, ["1"], bad)

    def test_no_unit_gets_more_than_what_is_left(self, make: Any) -> None:
        work, here = Work(), make()
        here.until = time.monotonic() + 20
        program.run(here, [work.unit("a")])
        assert 10 < work.limits[0] <= 20

    def test_what_was_brought_home_is_the_base(self, make: Any, monkeypatch: Any) -> None:
        work, first = Work(), make()
        program.run(first, [work.unit(op) for op in "ab"])
        monkeypatch.setattr(session, "RESULTS", first.path.parent)
        fresh = make("elsewhere")
        assert results.read(fresh.path) == results.read(first.path)
        work.status = {"a": "cut off", "b": "passed"}
        monkeypatch.setattr(session.Session, "_take_over", lambda self, stored: None)
        program.run(make("next"), [work.unit(op) for op in "ab"])  # knows nothing of the first
        monkeypatch.undo()
        monkeypatch.setattr(results, "commit", lambda: "abc")
        monkeypatch.setattr(session, "RESULTS", first.path.parent)
        merged = make("next")
        assert merged.done("correctness", "a"), "a good run gives way to none that was cut off"
        assert merged.done("correctness", "b"), "nor to a failed one"

    def test_the_next_step_is_printed(self, make: Any) -> None:
        here = make()
        told = program.advice(here, ["1"], [])
        assert f"{here.path} -> " in told
        assert "next: bench/gpu.sh run 2" in told
        assert "run" not in program.advice(here, ["3"], []).splitlines()[-1]


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return path.stem


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


class TestProcess:
    @pytest.mark.parametrize("short", [False, True], ids=["process", "forked"])
    def test_words_and_exit_code(
        self, short: bool, make: Any, tmp_path: Path, monkeypatch: Any
    ) -> None:
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        name = write(tmp_path / "words_one.py", "import sys\nprint(sys.argv[1:])\nsys.exit('why')")
        status, text = make(short=short).module(name, ["--a", "b"], 60.0)
        assert status == "failed with exit code 1"
        assert "['--a', 'b']" in text

    @pytest.mark.parametrize("short", [False, True], ids=["process", "forked"])
    def test_a_hanging_unit_is_ended_with_what_it_started(
        self, short: bool, make: Any, tmp_path: Path, monkeypatch: Any
    ) -> None:
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        child = tmp_path / "child"
        code = f"""
            import subprocess, time
            child = subprocess.Popen(["sleep", "300"])
            open({str(child)!r}, "w").write(str(child.pid))
            print("begun", flush=True)
            time.sleep(300)
        """
        name = write(tmp_path / "hangs_one.py", "\n".join(s.strip() for s in code.splitlines()))
        start = time.monotonic()
        limit = 4.0
        status, text = make(short=short).module(name, [], limit)
        assert (status, text) == ("cut off", "begun\n")
        assert time.monotonic() - start < limit + 10
        # A busy machine may take a while to end what was killed.
        while lives(int(child.read_text())):
            assert time.monotonic() - start < limit + 30, "a child lives on"
            time.sleep(0.05)


class TestCases:
    """The proof of an op writes every case down before the next."""

    @pytest.fixture
    def table(self, monkeypatch: Any) -> Any:
        from bench.support import doubling

        cases = [doubling(name=n, ours=list if n == "bad" else None) for n in ("one", "bad", "two")]
        ours = [_only_ours(case) for case in cases]
        module = type("M", (), {"OP": "double", "small": lambda device: iter(ours)})
        monkeypatch.setattr(ops, "modules", lambda only="": [module])
        return ours

    def test_a_wrong_case_is_stored_and_the_rest_runs(self, table: Any, tmp_path: Path) -> None:
        path = tmp_path / "r.json"
        assert small.main(["--json", str(path)]) == 1
        (run,) = results.read(path)
        assert run["passed"] == {"cpu": ["one f32", "two f32"]}
        assert run["failed"] == [
            ["bad", "f32", "cpu", "AssertionError: cpu: expected twice the numbers"]
        ]
        assert run["status"] == "failed: 1 case(s)"

    def test_a_proof_that_is_killed_keeps_all_but_one_case(
        self, table: Any, tmp_path: Path, monkeypatch: Any
    ) -> None:
        monkeypatch.setattr(results, "commit", lambda: "abc")
        path = tmp_path / "r.json"
        table[2] = _dying(table[2])
        with pytest.raises(KeyboardInterrupt):
            small.main(["--json", str(path)])
        (run,) = results.read(path)
        assert (run["status"], run["passed"]) == ("cut off", {"cpu": ["one f32"]})
        assert [row[0] for row in run["failed"]] == ["bad"]
        ran: list[str] = []
        table[:] = [_noting(case, ran) for case in table]
        small.main(["--json", str(path)])
        assert ran == ["bad", "two"], "what has passed is not run again, what has failed is"

    def test_a_lost_device_is_left_behind(
        self, table: Any, tmp_path: Path, monkeypatch: Any, make: Any
    ) -> None:
        """The unit starts again past the case that broke it, as often as it takes."""
        here = make()
        table[2] = _only_ours(table[2])
        broken = {"bad"}
        monkeypatch.setattr(small.Machine, "alive", lambda self: not (broken and broken.pop()))

        def module(name: str, arguments: list[str], limit: float) -> tuple[str, str]:
            code = small.main(arguments)
            return ("passed" if code == 0 else f"failed with exit code {code}"), ""

        monkeypatch.setattr(here, "module", module)
        status = work.correctness(here, "correctness", "double", 60.0)
        run = here.stored("correctness", "double")
        assert status == "failed: 1 case(s)"
        assert run["passed"] == {"cpu": ["one f32", "two f32"]}

    def test_a_process_that_dies_keeps_its_words(self, make: Any, monkeypatch: Any) -> None:
        here = make()
        here.store("ops", "tap_", {"status": "cut off", "rows": []})
        monkeypatch.setattr(here, "module", lambda *a: ("failed with exit code -11", "x\nfault\n"))
        assert work.bench(here, "ops", "tap_", 60.0) == "failed with exit code -11"
        assert here.stored("ops", "tap_")["log"] == ["x", "fault"]


def _only_ours(case: Any) -> Any:
    from dataclasses import replace

    return replace(case, candidates=tuple(c for c in case.candidates if c.kind == "ours"))


def _dying(case: Any) -> Any:
    from dataclasses import replace

    def check(candidate: Candidate) -> None:
        raise KeyboardInterrupt

    return replace(case, check=check)


def _noting(case: Any, ran: list[str]) -> Any:
    from dataclasses import replace

    return replace(case, check=lambda candidate: ran.append(case.name))


class TestSanitizer:
    def test_filters_name_every_kernel_of_ours(self) -> None:
        names = work.kernel_names()
        jits = set()
        for file in (ROOT / "triton_kernels").glob("*.py"):
            jits |= set(re.findall(r"^def (\w+_kernel)\(", file.read_text(), re.MULTILINE))
        assert jits and jits <= set(names)
        for file in (ROOT / "csrc" / "cuda").glob("*.cuh"):
            text = file.read_text()
            if "__global__" in text:
                assert "namespace sidechain::cuda {" in text, "9sidechain4cuda is in its names"
        assert "9sidechain4cuda" in names

    @pytest.mark.parametrize(
        ("code", "printed", "status"),
        [
            (0, "========= ERROR SUMMARY: 0 errors", "passed"),
            (0, "", "failed: the tool printed no summary"),
            (99, "========= ERROR SUMMARY: 1 error", "failed with exit code 99"),
        ],
    )
    def test_the_tool(
        self, code: int, printed: str, status: str, make: Any, tmp_path: Path, monkeypatch: Any
    ) -> None:
        tool = tmp_path / "compute-sanitizer"
        tool.write_text(
            f"#!/bin/sh\necho \"$@\" >{tmp_path}/asked\necho '{printed}'\nexit {code}\n"
        )
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        here = make()
        monkeypatch.setattr(here, "device", "cuda")
        assert work.sanitizer(here, "sanitizer", "racecheck", 60.0) == status
        asked = (tmp_path / "asked").read_text()
        assert asked.startswith("--tool racecheck --error-exitcode 99 --kernel-name kns=9sidechain")
        assert f"{sys.executable} -m sidechain.bench.small --device cuda" in asked

    def test_skipped_without_a_gpu(self, make: Any) -> None:
        assert work.sanitizer(make(), "sanitizer", "memcheck", 1.0) == "skipped"


class TestWarm:
    def test_shares_deal_out_every_launch_once(self, monkeypatch: Any, capsys: Any) -> None:
        called: list[str] = []
        table = [_counted(n, called) for n in "abcde"]
        monkeypatch.setattr(warm, "launches", lambda device, only: iter(table))
        found = [warm.share("cpu", "", n, 3) for n in range(3)]
        assert sorted(called) == list("abcde")
        assert sum(f["launched"] for f in found) == 4
        assert sum(f["failed"] for f in found) == 1
        assert "c f32 triton: ValueError: no" in capsys.readouterr().out

    def test_launches_are_those_of_triton(self, monkeypatch: Any) -> None:
        need_kernel("topk_encode")
        monkeypatch.setattr(warm, "BACKEND", "reference")
        found = list(warm.launches("cpu", "encode"))
        assert found
        assert all(candidate.name == "reference" for _, candidate in found)

    def test_processes_add_up(self, monkeypatch: Any, capsys: Any) -> None:
        """Real processes: on a CPU there is nothing of Triton's to launch, and that is an error."""
        assert warm.main(["--device", "cpu", "--only", "sae_edit_", "--processes", "2"]) == 1
        line = capsys.readouterr().out.strip().splitlines()[-1]
        told = json.loads(line.partition(": ")[2])
        assert told == {"launched": 0, "failed": 0, "processes lost": 0}


def _counted(name: str, called: list[str]) -> Any:
    from types import SimpleNamespace

    def call(args: Any) -> None:
        called.append(name)
        if name == "c":
            raise ValueError("no")

    case = SimpleNamespace(name=name, dtype="f32", make=lambda seed: None)
    return case, Candidate("triton", call, "ours")
