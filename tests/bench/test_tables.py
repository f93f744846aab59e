# SPDX-License-Identifier: Apache-2.0
"""bench/RESULTS.md and the table of README.md are what their generator writes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tables.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
MACHINE = "amd-epyc-avx512-2-cores.json"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the result files and of the pages."""
    shutil.copytree(ROOT / "bench" / "results", tmp_path / "bench" / "results")
    for page in ("README.md", "bench/RESULTS.md"):
        shutil.copy(ROOT / page, tmp_path / page)
    return tmp_path


def test_the_pages_are_what_the_generator_writes() -> None:
    command = [sys.executable, "-m", "bench.tables", "--check"]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def change(
    root: Path, section: str, op: str | None, provider: str, facts: Any = (), **fields: object
) -> None:
    """Change every row of a provider in the newest result of an op, which the tables show."""
    found = {p: json.loads(p.read_text()) for p in (root / "bench" / "results").glob("*.json")}
    dates = {
        p: run["date"]
        for p, record in found.items()
        for run in sorted(record["runs"], key=lambda run: str(run["date"]))
        if (run["section"], run["op"]) == (section, op)
    }
    path = max(dates, key=lambda p: dates[p])
    record = found[path]
    rows = [
        row
        for run in record["runs"]
        if (run["section"], run["op"]) == (section, op)
        for row in run["rows"]
        if row["provider"] == provider
    ]
    assert rows
    for row in rows:
        row.update(fields, facts=row["facts"] | dict(facts))
    path.write_text(json.dumps(record))


def test_a_changed_figure_is_found_and_written(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(copy, "ops", "tap_", "cpu", median_us=1_234_500.0)
    assert main(["--check", "--root", str(copy)]) == 1
    told = capsys.readouterr().out
    assert "README.md: differs" in told and "RESULTS.md: differs" in told
    assert main(["--root", str(copy)]) == 0
    assert "1234.5 ms" in (copy / "README.md").read_text()
    assert "| 1234.50 |" in (copy / "bench" / "RESULTS.md").read_text()
    assert main(["--check", "--root", str(copy)]) == 0


def test_rows_that_lose_are_named(copy: Path) -> None:
    """Each kind of loss, where there is none today."""
    change(copy, "ops", "sae_edit_", "cpu", times_plain=0.5)
    change(copy, "hooks", None, "tap: mean + steer", facts={"added_us": 98_765.0})
    change(copy, "sae", "encode", "cpu int8", times_plain=0.6)
    change(copy, "sae", "steps", "ours fp32", facts={"x peer": 0.7})
    change(copy, "store", "write", "files, fsync", facts={"x ours": 0.8})
    change(copy, "sharing", None, "hooks", facts={"x shared": 0.9})
    assert main(["--root", str(copy)]) == 0
    page = (copy / "bench" / "RESULTS.md").read_text()
    losses = page.split("## Where we lose")[1].split("## ")[0]
    for words in (
        "`sae_edit_` topk-N8200-d1536-F12288-k4 f32: 0.50x plain torch",
        "adds 98765 us, a plain hook",
        "cpu int8: 0.60x plain torch",
        "ours fp32: 0.70x the best package",
        "0.80x as fast as `files, fsync`",
        "0.90x against plain hooks",
    ):
        assert words in losses


def test_what_was_not_measured_says_so_and_what_was_cut_off_is_no_claim(copy: Path) -> None:
    path = copy / "bench" / "results" / MACHINE
    record = json.loads(path.read_text())
    record["runs"] = [run for run in record["runs"] if run["section"] != "sharing"]
    for run in record["runs"]:
        if run["op"] == "steps":
            run["status"] = "cut off"
    path.write_text(json.dumps(record))
    assert main(["--root", str(copy)]) == 0
    front = (copy / "README.md").read_text()
    assert "| Patching sweep of 10 presets, end to end | not measured yet |" in front
    step = next(line for line in front.splitlines() if line.startswith("| Training step"))
    assert "avx2" in step  # the run that is whole, though it is older
    assert "; cut off)" in (copy / "bench" / "RESULTS.md").read_text()


def test_a_gpu_has_its_own_tables(copy: Path) -> None:
    record = json.loads((copy / "bench" / "results" / MACHINE).read_text())
    record["runs"] = [run for run in record["runs"] if run["section"] == "ops"]
    for run in record["runs"]:
        run |= {"device": "cuda", "name": "Some GPU", "threads": None, "isa": None, "cores": None}
        run["versions"]["cuda"] = "13.0"
        for row in run["rows"]:
            row["share"] = row["times_compiled"] = None
    (copy / "bench" / "results" / "some-gpu.json").write_text(json.dumps(record))
    front = (copy / "README.md").read_text()
    assert main(["--root", str(copy)]) == 0
    page = (copy / "bench" / "RESULTS.md").read_text()
    here = page.split("## Ops on GPUs")[1].split("\n## ")[0]
    assert "`tap_`, Some GPU, 2026" in here and ", CUDA 13.0, commit" in here
    assert "| case | dtype | way | us | against plain torch |" in here  # no empty columns
    assert "| `some-gpu.json` | Some GPU | cuda |" in page
    after = (copy / "README.md").read_text()
    assert after == front.replace(" No GPU has been measured yet.", "")


def test_a_page_without_its_markers_is_refused(copy: Path) -> None:
    (copy / "README.md").write_text("# sidechain\n")
    with pytest.raises(ValueError, match="expected <!-- results --> and <!-- /results -->"):
        main(["--root", str(copy)])


def _step_rows(**added: float) -> list[dict[str, Any]]:
    return [
        {
            "case": case, "dtype": "f32", "provider": way, "kind": "ours", "median_us": 1e5,
            "failed": "", "facts": {"added_us": us, "added_share": us / 1e5, **more},
        }
        for case, way, us, more in (
            ("step-zoo-R2", "hooks: mean + add", added["hooks"], {}),
            ("step-zoo-R2", "nnsight: mean + add", added["nnsight"], {}),
            ("step-zoo-R2", "taps: mean + steer", added["taps"], {}),
            ("compiled-zoo-R2", "taps: mean + steer", added["compiled"],
             {"recompiled": added.get("recompiled", 0)}),
        )
    ]  # fmt: skip


def _add_steps(root: Path, rows: list[dict[str, Any]]) -> str:
    """Put rows of steps beside those of the sites of one machine alone; return the page."""
    path = root / "bench" / "results" / MACHINE
    for other in path.parent.glob("*.json"):
        if other != path:
            other.unlink()  # its steps have losses of their own
    record = json.loads(path.read_text())
    run = next(run for run in record["runs"] if run["section"] == "hooks")
    run["rows"] = [row for row in run["rows"] if not row["case"].startswith(("step-", "compiled-"))]
    run["rows"] += rows
    path.write_text(json.dumps(record))
    assert main(["--root", str(root)]) == 0
    return (root / "bench" / "RESULTS.md").read_text()


def test_steps_that_miss_an_aim_are_named(copy: Path) -> None:
    rows = _step_rows(hooks=3000.0, nnsight=9000.0, taps=3500.0, compiled=1100.0, recompiled=2)
    page = _add_steps(copy, rows)
    losses = page.split("## Where we lose")[1].split("## ")[0]
    for words in (
        "step-zoo-R2: taps add 3.5% to a step, where 3% is the aim",
        "step-zoo-R2: taps add 3500 us to a step, plain hooks 3000 us",
        "step-zoo-R2: nnsight adds 2.6 times what taps add to a step, where 5 is the aim",
        "compiled-zoo-R2: taps add 1.1% to a step, where 1% is the aim",
        "compiled-zoo-R2: 2 graphs were made again",
    ):
        assert words in losses
    assert "| step-zoo-R2 | taps: mean + steer | 100.00 | 3500 | 3.50% | 2.57x |" in page


def test_steps_that_meet_the_aims_are_no_loss(copy: Path) -> None:
    rows = _step_rows(hooks=3000.0, nnsight=9000.0, taps=1700.0, compiled=900.0)
    rows[1] |= {"median_us": None, "failed": "nnsight is not installed here", "facts": {}}
    page = _add_steps(copy, rows)
    losses = page.split("## Where we lose")[1].split("## ")[0]
    assert "zoo-R2:" not in losses
    assert "Not measured: nnsight is not installed here." in page
