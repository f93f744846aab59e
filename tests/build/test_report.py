# SPDX-License-Identifier: Apache-2.0
"""The tables of `make kernels-report`."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from build import report_tables
from build.kernel_rows import LoopRow, Row
from build.launches import Call

PLAIN: dict[str, Any] = {
    "arch": "sm_90a", "registers": 40, "stack": 0, "static": 128, "dynamic": 2048, "threads": 256,
    "blocks": 6, "occupancy": 0.75, "narrowest": 4, "widest": 16, "instructions": 60, "bytes": 64,
    "per_element": 3.75, "loads": 4, "flight": 98304, "issue": 9.441, "loop": "tap.cuh:7",
    "narrow": {"4": ["tap.cuh:9"]}, "wide_bytes": 48, "launch": "bench",
    "loops": (LoopRow(1, 0, 9, 0, (), ""), LoopRow(2, 64, 60, 4, (4, 16), "tap.cuh:7")),
}  # fmt: skip


def row(name: str, **changes: Any) -> Row:
    return replace(Row(kernel=name, **PLAIN), **changes)


def shown(rows: list[Row], sort: str) -> list[str]:
    """Kernels in the order of the table."""
    return [line.split("sm_90a ")[1].split()[0] for line in lines(rows, sort)[1:]]


def lines(rows: list[Row], sort: str = "kernel") -> list[str]:
    return report_tables.kernels(rows, sort).splitlines()


def test_a_line_holds_every_column() -> None:
    head, line = lines([row("tap_kernel")])
    names, cells = head.split(), line.split()
    assert names[:3] == ["reg", "static", "dynamic"]
    numbers = ["40", "128", "2048", "256", "6", "75%", "4", "16", "60", "64", "3.75", "4", "96.0"]
    assert cells == [*numbers, "944%", "sm_90a", "tap_kernel", "tap.cuh:7"]


def test_the_worst_comes_first() -> None:
    rows = [
        row("a", per_element=1.0, occupancy=0.5, issue=2.0),
        row("b", per_element=9.0, occupancy=1.0, issue=8.0),
        row("c", per_element=4.0, occupancy=0.1, issue=0.5),
    ]
    assert shown(rows, "kernel") == ["a", "b", "c"]
    assert shown(rows, "per_element") == ["b", "c", "a"]
    assert shown(rows, "occupancy") == ["c", "a", "b"]
    assert shown(rows, "issue") == ["c", "a", "b"]


def test_loops_follow_their_kernel() -> None:
    rows = [row("good", narrow={}, per_element=1.0), row("bad", per_element=2.0)]
    found = report_tables.kernels(rows, "per_element", loops=True).splitlines()
    loop = "    tap.cuh:7: 64 bytes, 60 instructions, 4 loads in flight, accesses of 4, 16 bytes"
    assert "bad" in found[1]
    assert found[2:4] == [loop, "  4 bytes at tap.cuh:9"]
    assert "good" in found[4]
    assert found[5:] == [loop]


def test_spills_are_marked() -> None:
    head, fine, spilling = lines([row("a"), row("b", stack=8)])
    assert spilling.endswith("SPILLS")
    assert "SPILLS" not in head + fine


def test_equal_compilations_take_one_line() -> None:
    rows = [
        row("value_kernel<bfloat16, one>", launch="bfloat16, one"),
        row("value_kernel<bfloat16, two>", launch="bfloat16, two"),
        row("value_kernel<bfloat16, three>", launch="bfloat16, three", registers=41),
    ]
    text = lines(rows)
    assert len(text) == 3
    assert "value_kernel<bfloat16, one> and 1 alike" in text[1]
    assert len(lines([row("tap<float, 4>"), row("tap<float, 1>")])) == 3


def test_names_are_told_apart() -> None:
    rows = [row("k"), row("k"), row("other"), row("k", arch="sm_80")]
    named = [(r.kernel, r.arch) for r in report_tables.numbered(rows)]
    assert named == [("k", "sm_90a"), ("k#2", "sm_90a"), ("other", "sm_90a"), ("k", "sm_80")]


def test_before_and_after() -> None:
    before = [asdict(r) for r in (row("same"), row("better"), row("old"))]
    after = [row("same", loop="moved.cuh:1"), row("better", registers=32, loads=8), row("fresh")]
    assert report_tables.compared(before, after).splitlines() == [
        "sm_90a better: registers 40 -> 32, loads 4 -> 8",
        "sm_90a fresh: new",
        "sm_90a old: gone",
    ]
    assert report_tables.compared(before[:1], after[:1]) == "no kernel changed"


def test_calls_have_a_least_time() -> None:
    text = report_tables.calls([
        Call("tap_", "steer", "bf16", 3_350_000, 0, 2),
        Call("attention_tap", "wide", "bf16", 3_350_000, 9_890_000_000, 0),
    ])  # fmt: skip
    _, memory, matrix = (line.split() for line in text.splitlines())
    assert memory == ["3.4", "-", "1.0", "memory", "2", "tap_", "steer", "bf16"]
    assert matrix == ["3.4", "9.9", "10.0", "matrix", "-", "attention_tap", "wide", "bf16"]
