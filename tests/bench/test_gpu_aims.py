# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

from gpu_host import aims
from sidechain.bench import results
from sidechain.bench.cases import Row


def run(section: str, op: str | None, *rows: Row, device: str = "cuda") -> dict[str, Any]:
    return results.new_run(section, op, {"device": device, "threads": None}, rows)


def row(case: str, provider: str, us: float | None, kind: str = "ours", **more: Any) -> Row:
    dtype = more.pop("dtype", "bf16")
    return Row(case, dtype, provider, kind, 0, 0, median_us=us, **more)


def step(provider: str, kind: str, x: float, counts: str = "yes", shape: str = "") -> Row:
    facts = {"x ours": x, "counts": counts}
    case = shape or aims.RACES[0]
    return row(case, provider, 100.0 * x, kind, dtype="f32", facts=facts)


RUNS = [
    run(
        "ops", "tap_",
        row(f"steer-{aims.TAP_SITE}", "cuda", 9.0, share=0.9),
        row(f"capture-{aims.TAP_SITE}", "cuda", 9.0, share=0.8),
        row(f"capture-{aims.TAP_SITE}", "reference", 9.0, share=0.1),
        row(f"capture-{aims.TAP_SITE}", "cuda", 9.0, share=0.2, dtype="f32"),
        row(f"all-{aims.TAP_SMALL}", "cuda", 5.5, share=0.1),
    ),
    run(
        "ops", "attention_tap",
        row("a", "sdpa alone", 10.0, "part"), row("a", "triton", 10.4), row("a", "reference", 1.0),
        row("b", "sdpa alone", 10.0, "part"), row("b", "triton", 9.0),
    ),
    run(
        "sae", "encode",
        row("e", "product bf16", 10.0, "part", dtype="f32"),
        row("e", "triton fp32", 30.0, dtype="f32"), row("e", "triton bf16", 25.0, dtype="f32"),
    ),
    run(
        "sae", "steps",
        step("ours fp32", "ours", 1.0), step("ours bf16", "ours", 0.5),
        step("dense bf16", "plain", 2.0), step("eai-sparsify", "peer", 3.0),
        step("dense compiled", "compiled", 0.1), step("ours int8", "ours", 0.1, "no"),
    ),
]  # fmt: skip


def test_the_worst_row_decides() -> None:
    found = {r["aim"]: r for r in aims.table(RUNS)}
    assert len(found) == len(aims.AIMS)
    told = [(r["measured"], r["verdict"]) for r in found.values()]
    assert told == [
        (0.8, "missed"), (5.5, "met"), (1.04, "met"), (2.5, "missed"), (4.0, "met"),
        (None, "not measured"),
    ]  # fmt: skip
    text = aims.text(list(found.values()))
    assert "missed        tap_ in copy rates" in text
    assert f"(capture-{aims.TAP_SITE} bf16 cuda)" in text
    assert "not measured" in text


def test_figures_of_a_cpu_and_failed_rows_do_not_count() -> None:
    slow = row(f"x-{aims.TAP_SMALL}", "cuda", 99.0, failed="wrong")
    runs = [run("ops", "tap_", slow), run("ops", "tap_", slow, device="cpu")]
    assert {r["verdict"] for r in aims.table(runs)} == {"not measured"}


def test_rows_are_named_as_the_bench_names_them() -> None:
    """An aim that looks for rows nobody writes would say "not measured" for ever."""
    from sidechain.bench.ops import attention_tap, tap, topk_encode
    from sidechain.bench.sae import race

    names = {case.name for case in tap.cases("cpu")}
    assert any(name.endswith(aims.TAP_SITE) for name in names)
    assert any(name.endswith(aims.TAP_SMALL) for name in names)
    assert tuple(shape.name for shape in race.SHAPES["cuda"]) == aims.RACES
    assert set(aims.RIVALS) < {entry.name for entry in race.entries("cuda")}
    (case, *_) = attention_tap.cases("cpu", quick=True)
    assert "sdpa alone" in [c.name for c in case.candidates]
    (case, *_) = topk_encode.cases("cpu", quick=True)
    assert aims.PRODUCT in [c.name for c in case.candidates]
