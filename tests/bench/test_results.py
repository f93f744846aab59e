# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import sidechain
from bench.support import doubling
from sidechain.bench import ops, results
from sidechain.bench import run as command
from sidechain.bench.cases import Row, run_case
from sidechain.bench.config import BenchSettings
from sidechain.bench.machine import Machine
from sidechain.cli import main as cli

ROOT = Path(__file__).resolve().parents[2]


def a_run(
    op: str = "tap_", threads: int | None = 1, us: float = 5.0, **more: Any
) -> dict[str, Any]:
    row = Row("c", "f32", "cpu", "ours", 10, 0, median_us=us)
    return results.new_run("ops", op, {"device": "cpu", "threads": threads, **more}, [row])


class TestFile:
    def test_a_newer_run_replaces_only_its_own(self, tmp_path: Path) -> None:
        path = tmp_path / "deep" / "m.json"
        for run in (a_run(us=5.0), a_run(threads=2), a_run("other_"), a_run(us=7.0)):
            results.merge(path, run)
        runs = results.read(path)
        assert [(r["op"], r["threads"]) for r in runs] == [("other_", 1), ("tap_", 1), ("tap_", 2)]
        assert runs[1]["rows"][0]["median_us"] == 7.0
        assert [p.name for p in path.parent.iterdir()] == ["m.json"]

    def test_runs_without_rows_and_sections_live_together(self, tmp_path: Path) -> None:
        path = tmp_path / "m.json"
        results.merge(path, results.new_run("correctness", None, {"passed": 3}, []))
        results.merge(path, a_run())
        assert [r["section"] for r in results.read(path)] == ["correctness", "ops"]

    def test_one_line_a_row(self, tmp_path: Path) -> None:
        path = tmp_path / "m.json"
        results.merge(path, a_run())
        assert sum('"median_us"' in line for line in path.read_text().splitlines()) == 1

    @pytest.mark.parametrize(
        ("text", "match"),
        [("{", "in JSON"), ("[]", "format 2 in .*, got list"), ('{"format": 9}', "got 9")],
    )
    def test_other_files_are_refused(self, text: str, match: str, tmp_path: Path) -> None:
        path = tmp_path / "m.json"
        path.write_text(text)
        with pytest.raises(ValueError, match=f"^bench: expected results.*{match}"):
            results.merge(path, a_run())
        assert path.read_text() == text

    def test_the_committed_files_are_readable(self) -> None:
        stored = [p for p in (ROOT / "bench" / "results").glob("*-cores.json")]
        assert stored
        for path in stored:
            for run in results.read(path):
                for row in run["rows"]:
                    Row(**row)


class TestCommit:
    def test_a_copied_tree_names_its_commit(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sidechain, "__file__", str(tmp_path / "__init__.py"))
        assert results.commit() == "installed"
        (tmp_path / "COMMIT").write_text("abc1234\n")
        assert results.commit() == "abc1234"

    def test_results_do_not_make_a_tree_dirty(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        package, result = tmp_path / "package" / "__init__.py", tmp_path / "bench/results/a.json"
        page = tmp_path / "bench" / "RESULTS.md"
        for file in (package, result, page):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("1")
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        for call in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "first"]):
            subprocess.run(["git", "-C", str(tmp_path), *call], check=True)
        monkeypatch.setattr(sidechain, "__file__", str(package))
        clean = results.commit()
        result.write_text("2")
        page.write_text("2")
        assert results.commit() == clean and not clean.endswith("-dirty")
        package.write_text("2")
        assert results.commit() == f"{clean}-dirty"


class TestText:
    def test_table_leaves_empty_columns_out(self) -> None:
        rows = [
            Row("c", "f32", "eager", "plain", 1, 0, median_us=12.34, times_plain=1.0),
            Row("c", "f32", "peer", "peer", 1, 0, failed="ImportError: not installed"),
        ]
        text = results.table(rows)
        assert "12.3" in text
        assert "TFLOP/s" not in text
        assert "c f32 peer: failed: ImportError: not installed" in text

    def test_comparison(self) -> None:
        text = results.comparison([a_run(us=2.0)], [a_run(us=5.0)])
        assert text.splitlines()[1].split()[:6] == ["c", "f32", "cpu", "2.0", "5.0", "2.50"]
        assert "nothing in common" in results.comparison([a_run("a_")], [a_run("b_")])


@pytest.fixture
def doubler(monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(OP="double", cases=lambda device, quick: [doubling()])
    monkeypatch.setattr(ops, "modules", lambda only="": [module])
    monkeypatch.setattr(Machine, "facts", lambda self: {
        "device": "cpu", "name": "here", "threads": 1, "limits": {"copy_gbytes_per_s": 1.0},
        "versions": {"torch": "2"},
    })  # fmt: skip


@pytest.mark.usefixtures("doubler")
class TestCommand:
    def test_stores_and_compares(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = tmp_path / "r.json"
        assert cli.main(["bench", "--seconds", "0", "--json", str(path)]) == 0
        assert json.loads(path.read_text())["runs"][0]["op"] == "double"
        arguments = ["bench", "ops", "--seconds", "0", "--compare", str(path)]
        assert cli.main(arguments) == 0
        out = capsys.readouterr().out
        assert "here, 1 thread(s), torch 2: copy_gbytes_per_s 1.0" in out
        assert "times faster" in out

    def test_a_run_that_was_cut_off_keeps_its_rows(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def cases(device: str, quick: bool) -> Any:
            yield doubling()
            raise KeyboardInterrupt

        module = SimpleNamespace(OP="double", cases=cases)
        monkeypatch.setattr(ops, "modules", lambda only="": [module])
        path = tmp_path / "r.json"
        with pytest.raises(KeyboardInterrupt):
            command.run(BenchSettings(section="ops", seconds=0.0, json=path))
        (run,) = results.read(path)
        assert (run["status"], len(run["rows"])) == ("cut off", 2)
        monkeypatch.setattr(module, "cases", lambda device, quick: [doubling()])
        command.run(BenchSettings(section="ops", seconds=0.0, json=path))
        assert [r["status"] for r in results.read(path)] == ["passed"]

    def test_a_wrong_case_is_stored_and_the_rest_of_the_op_runs(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        table = [doubling(name="good"), doubling(name="bad", ours=list), doubling(name="last")]
        made: list[str] = []

        def cases(device: str, quick: bool) -> Any:
            for case in table:
                made.append(case.name)
                yield case

        module = SimpleNamespace(OP="double", cases=cases)
        monkeypatch.setattr(ops, "modules", lambda only="": [module])
        monkeypatch.setattr(results, "commit", lambda: "abc1234")
        path = tmp_path / "r.json"
        arguments = ["bench", "--seconds", "0", "--json", str(path)]
        assert cli.main(arguments) == 1
        (run,) = results.read(path)
        assert made == ["good", "bad", "last"]
        assert run["status"] == "failed: bad f32 cpu"
        times = {(row["case"], row["provider"]): row["median_us"] for row in run["rows"]}
        assert times["last", "cpu"]
        table[1] = doubling(name="bad")
        assert cli.main(arguments) == 0
        (again,) = results.read(path)
        assert again["status"] == "passed"
        later = {(row["case"], row["provider"]): row["median_us"] for row in again["rows"]}
        assert later["last", "cpu"] == times["last", "cpu"], "good cases are not measured again"

    def test_a_lost_device_ends_the_call(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        table = [doubling(name="good"), doubling(name="breaks", ours=list), doubling(name="last")]
        module = SimpleNamespace(OP="double", cases=lambda device, quick: iter(table))
        monkeypatch.setattr(ops, "modules", lambda only="": [module])
        monkeypatch.setattr(results, "commit", lambda: "abc1234")
        alive = iter([True, False])
        monkeypatch.setattr(Machine, "alive", lambda self: next(alive))
        path = tmp_path / "r.json"
        arguments = ["bench", "--seconds", "0", "--json", str(path)]
        assert cli.main(arguments) == command.LOST_CODE
        (run,) = results.read(path)
        assert run["status"] == command.LOST
        assert [row["case"] for row in run["rows"]] == ["good", "good", "breaks", "breaks"]
        monkeypatch.setattr(Machine, "alive", lambda self: True)
        assert cli.main([*arguments, "--keep-failed"]) == 1
        (run,) = results.read(path)
        assert run["status"] == "failed: breaks f32 cpu"
        assert run["rows"][-1]["case"] == "last"
        assert run["rows"][-1]["median_us"]

    def test_a_folder_gets_a_file_of_this_machine(self, tmp_path: Path) -> None:
        command.run(BenchSettings(section="ops", seconds=0.0, json=tmp_path))
        (path,) = tmp_path.iterdir()
        assert path.stem == Machine("cpu").slug

    @pytest.mark.parametrize(
        ("arguments", "match"),
        [
            (["nonsense"], "invalid choice"),
            (["--threads", "0"], "--threads: expected"),
            (["--compare", "missing.json"], "missing.json"),
            (["--device", "tpu"], "invalid choice"),
        ],
    )
    def test_bad_input(
        self, arguments: list[str], match: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert cli.main(["bench", *arguments]) == 2
        assert match in capsys.readouterr().err


class TestOps:
    def test_unknown_op(self) -> None:
        with pytest.raises(ValueError, match=r"bench: expected an op of tap_.*, got 'nope'"):
            ops.modules("nope")

    @pytest.mark.parametrize("module", ops.modules(), ids=lambda m: m.OP)
    def test_small_cases_check(self, module: Any) -> None:
        """The path of the GPU host, on the CPU; the case table itself is tested with the op."""
        found = list(module.small("cpu"))
        assert found
        for case in {id(c): c for c in found[:2] + found[::5]}.values():
            for candidate in case.candidates:
                case.check(candidate)

    @pytest.mark.parametrize("module", ops.modules(), ids=lambda m: m.OP)
    def test_quick_cases_pass(self, module: Any) -> None:
        """Everything that is timed, ours and others, on shapes that take no time."""
        found = list(module.cases("cpu", quick=True))
        assert found
        for case in found:
            for candidate in case.candidates:
                case.check(candidate)
            assert not any(c.kind == "compiled" for c in case.candidates)

    @pytest.mark.parametrize("module", ops.modules(), ids=lambda m: m.OP)
    def test_timed_cases_are_complete(self, module: Any) -> None:
        for case in module.cases("cpu"):
            kinds = [c.kind for c in case.candidates]
            assert "ours" in kinds
            # What plain torch does not have (narrow moments) stands alone.
            assert set(kinds) == {"ours"} or (kinds[0] == "plain" and "compiled" in kinds)
            assert case.moved > 0

    def test_one_case_end_to_end(self) -> None:
        case = next(ops.modules("tap_")[0].small("cpu"))
        rows = run_case(case, Machine("cpu", seconds=0.0), seconds=0.0)
        assert {r.kind for r in rows} == {"ours"}
        assert all(r.median_us for r in rows)
