# SPDX-License-Identifier: Apache-2.0
"""Aims of the kernels on an H100, compared with the figures of a result file."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

Runs = list[dict[str, Any]]
Rows = list[dict[str, Any]]
Value = tuple[float, str]  # the figure, and the row it comes from

TAP_SITE = "R8-T1025-C1536"
TAP_SMALL = "R2-T323-C2560"
RACES = ("N8192-d1280-F20480-k32", "N8192-d4096-F65536-k64")
RIVALS = ("dense bf16", "eai-sparsify")
PRODUCT = "product bf16"


@dataclass(frozen=True)
class Aim:
    """An aim for one figure.

    Attributes:
        name: what is measured.
        least: it should be at least this; None where `most` counts.
        most: it should be at most this.
        unit: of the figure.
        find: runs -> every figure that counts, the worst of which decides.
    """

    name: str
    unit: str
    find: Callable[[Runs], list[Value]]
    least: float | None = None
    most: float | None = None

    def judge(self, runs: Runs) -> dict[str, Any]:
        """Return the worst figure and whether the aim is met."""
        wanted = f">= {self.least:g}" if self.least is not None else f"<= {self.most:g}"
        found = self.find(runs)
        told = {"aim": self.name, "wanted": f"{wanted} {self.unit}", "measured": None, "where": ""}
        if not found:
            return told | {"verdict": "not measured"}
        value, where = min(found) if self.least is not None else max(found)
        met = value >= self.least if self.least is not None else value <= (self.most or 0.0)
        verdict = "met" if met else "missed"
        return told | {"measured": round(value, 3), "where": where, "verdict": verdict}


def _rows(runs: Runs, section: str, op: str | None) -> Rows:
    return [
        row
        for run in runs
        if run["section"] == section and run["op"] == op and run["device"] == "cuda"
        for row in run["rows"]
        if row["median_us"] and not row["failed"]
    ]


def _ours(rows: Iterable[dict[str, Any]]) -> Rows:
    return [row for row in rows if row["kind"] == "ours" and row["provider"] != "reference"]


def _label(row: dict[str, Any]) -> str:
    return f"{row['case']} {row['dtype']} {row['provider']}"


def tap_share(runs: Runs) -> list[Value]:
    """Shares of the copy rate of all forms of the tap in bfloat16 at one site."""
    rows = [r for r in _ours(_rows(runs, "ops", "tap_")) if r["dtype"] == "bf16"]
    return [(r["share"], _label(r)) for r in rows if r["case"].endswith(TAP_SITE)]


def tap_launch(runs: Runs) -> list[Value]:
    """Microseconds of a small site in bfloat16."""
    rows = [r for r in _ours(_rows(runs, "ops", "tap_")) if r["dtype"] == "bf16"]
    return [(r["median_us"], _label(r)) for r in rows if r["case"].endswith(TAP_SMALL)]


def _over(rows: Rows, limit: str, dtypes: tuple[str, ...]) -> list[Value]:
    """Time of our best over that of a part of the work, in each case."""
    found = []
    for bound in (r for r in rows if r["provider"] == limit and r["dtype"] in dtypes):
        same = ("case", "dtype")
        here = [r for r in _ours(rows) if all(r[key] == bound[key] for key in same)]
        if here:
            best = min(here, key=lambda r: r["median_us"])
            found.append((best["median_us"] / bound["median_us"], _label(best)))
    return found


def attention(runs: Runs) -> list[Value]:
    """Time of `attention_tap` while it captures, over that of SDPA alone."""
    return _over(_rows(runs, "ops", "attention_tap"), "sdpa alone", ("bf16", "f16"))


def encode(runs: Runs) -> list[Value]:
    """Time of `topk_encode` over that of the product in bfloat16 alone."""
    return _over(_rows(runs, "sae", "encode"), PRODUCT, ("f32",))


def _step(shape: str) -> Callable[[Runs], list[Value]]:
    def find(runs: Runs) -> list[Value]:
        rows = [r for r in _rows(runs, "sae", "steps") if r["case"] == shape]
        rows = [r for r in rows if r["facts"].get("counts") == "yes"]
        ours = [r for r in rows if r["kind"] == "ours"]
        rivals = [r for r in rows if r["provider"] in RIVALS]
        if not ours or not rivals:
            return []
        best, rival = (min(rs, key=lambda r: r["facts"]["x ours"]) for rs in (ours, rivals))
        ratio = rival["facts"]["x ours"] / best["facts"]["x ours"]
        return [(ratio, f"{best['provider']} beside {rival['provider']}")]

    return find


AIMS = (
    Aim("tap_ in copy rates, [8, 1025, 1536] bf16", "of the copy", tap_share, least=0.85),
    Aim("tap_ a launch, [2, 323, 2560] bf16", "us", tap_launch, most=6.0),
    Aim("attention_tap, capturing, over SDPA alone", "times", attention, most=1.05),
    Aim("topk_encode over the bf16 product alone", "times", encode, most=2.0),
    *(
        Aim(f"SAE step beside dense bf16 and sparsify, {shape}", "times faster", _step(shape), 3.5)
        for shape in RACES
    ),
)


def table(runs: Runs) -> list[dict[str, Any]]:
    """Every aim with its figure and verdict."""
    return [aim.judge(runs) for aim in AIMS]


def text(found: list[dict[str, Any]]) -> str:
    """Format the table for printing."""
    lines = ["aims on an H100"]
    for row in found:
        value = "-" if row["measured"] is None else f"{row['measured']:g}"
        where = f"  ({row['where']})" if row["where"] else ""
        lines.append(f"  {row['verdict']:<12}  {row['aim']}: {value}, {row['wanted']}{where}")
    return "\n".join(lines)
