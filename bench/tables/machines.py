# SPDX-License-Identifier: Apache-2.0
"""The machines that were measured, and what they can do at best."""

from __future__ import annotations

from .files import Results, Run
from .markdown import table

LIMITS = ("copy_gbytes_per_s", "f32_matrix_tflops", "bf16_matrix_tflops")


def machines(results: Results) -> list[str]:
    """One line for each result file and number of threads."""
    found: dict[tuple[str, int], list[Run]] = {}
    for run in results.all:
        if run.get("limits"):
            found.setdefault((run["file"], run["threads"] or 0), []).append(run)
    rows = []
    for (file, threads), runs in sorted(found.items()):
        first = runs[0]
        what = first.get("isa") or first["device"]
        cores = f"{first['cores']} cores" if first.get("cores") else ""
        days = _range([run["date"] for run in runs])
        limits = [_range([f"{run['limits'][name]:g}" for run in runs]) for name in LIMITS]
        rows.append([f"`{file}`", first["name"], what, cores, str(threads or ""), days, *limits])
    head = (
        *("file", "machine", "instructions", "cores", "threads", "measured"),
        *("copy, GB/s", "float32 products, TFLOP/s", "bfloat16 products, TFLOP/s"),
    )
    return [
        "Every run measures the limits of its machine too; two figures are the lowest and the "
        "highest of all runs. The CPUs belong to shared virtual machines, so their limits vary.",
        "",
        *table(head, rows),
        "",
    ]


def _range(values: list[str]) -> str:
    low, high = (f(values, key=_order) for f in (min, max))
    return low if low == high else f"{low} to {high}"


def _order(text: str) -> tuple[float, str]:
    try:
        return float(text), ""
    except ValueError:
        return 0.0, text
