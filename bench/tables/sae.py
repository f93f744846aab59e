# SPDX-License-Identifier: Apache-2.0
"""Training steps of sparse autoencoders, their encoders, and the memory of a step."""

from __future__ import annotations

from .files import Results, Row, Run, ours
from .markdown import Section, figure, machine, stamp, times

COMMAND = "make bench-sae"


def section(results: Results) -> Section:
    """All three, on every machine that was measured."""
    found = Section("Sparse autoencoders")
    for part, write in (("steps", _steps), ("encode", _encoders), ("memory", _memory)):
        for run in results.runs("sae", part):
            write(found, run)
    return found.measured("Sparse autoencoders", COMMAND)


def _steps(found: Section, run: Run) -> None:
    found.add(
        f"Training steps of a TopK dictionary, {stamp(run, COMMAND)}. Every trainer starts from "
        "the same weights and takes the same batches of `N` tokens with fused Adam. Each of its "
        "steps is timed next to one of ours, and all ratios are of these pairs. A trainer does not "
        "count if it has explained less of the variance than dense float32 torch after the same "
        "tokens, by more than a tenth of the way. FVU: fraction of variance unexplained. "
        "`~`: extrapolated from a few tokens, where bfloat16 is emulated:",
        (
            *("N, d, F, k", "trainer", "ms", "FVU", "counts", "times ours"),
            *("against best package", "against dense bf16"),
        ),
        map(_step_row, run["rows"]),
    )
    found.losses += [
        f"training step {row['case']}, {row['provider']}: {times(row['facts'].get('x peer'))} the "
        f"best package, {times(row['facts'].get('x dense bf16'))} dense bfloat16 torch "
        f"({machine(run)}, {run['date']})."
        for row in ours(run)
        if any((row["facts"].get(name) or 1.0) < 1.0 for name in ("x peer", "x dense bf16"))
    ]


def _step_row(row: Row) -> list[str]:
    facts = row["facts"]
    name = " ".join(filter(None, (row["provider"], facts.get("version"))))
    if row["failed"]:
        return [row["case"], name, f"not run: {row['failed']}", "", "", "", "", ""]
    about = "~" if row["method"].startswith("extrapolated") else ""
    return [
        row["case"],
        name,
        f"{about}{row['median_us'] / 1000:.1f}",
        figure(facts.get("fvu"), ".4f"),
        facts["counts"],
        f"{about}{times(facts['x ours'])}",
        times(facts.get("x peer")),
        times(facts.get("x dense bf16")),
    ]


def _encoders(found: Section, run: Run) -> None:
    found.add(
        f"`topk_encode` against a linear layer and `topk` in float32, {stamp(run, COMMAND)}. "
        "Recall and equal sets (share of the rows) are measured against the exact sets in "
        "float64:",
        ("N, d, F, k", "way", "ms", "recall", "equal sets", "against plain torch"),
        (
            (
                row["case"],
                row["provider"],
                f"{row['median_us'] / 1000:.1f}",
                figure(row["facts"].get("recall"), ".5f"),
                figure(row["facts"].get("equal sets"), ".4f"),
                times(row["times_plain"]),
            )
            for row in run["rows"]
            if not row["provider"].startswith("ref")
        ),
    )
    found.losses += [
        f"encoder {row['case']}, {row['provider']}: {times(row['times_plain'])} plain torch "
        f"({machine(run)}, {run['date']})."
        for row in ours(run)
        if (row["times_plain"] or 1.0) < 1.0
    ]


def _memory(found: Section, run: Run) -> None:
    found.add(
        "Memory at the peak of a step, beyond what is held between steps (weights and Adam state), "
        f"{stamp(run, COMMAND)}:",
        ("N, d, F, k", "trainer", "MiB", "of dense torch", "measured as"),
        (
            (row["case"], row["provider"], f"not run: {row['failed']}", "", "")
            if row["failed"]
            else (
                row["case"],
                row["provider"],
                f"{row['facts']['extra_mib']:g}",
                figure(row["facts"].get("of dense"), ".1%"),
                row["method"],
            )
            for row in run["rows"]
        ),
    )
