# SPDX-License-Identifier: Apache-2.0
"""Timing of ops against what people would write instead, one policy for every bench.

Correctness is asserted before anything is timed. Results go to bench/results/<machine>.json; rows
that lose stay in.
"""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from sidechain import doctor

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Row:
    """One measured cell; times in microseconds."""

    case: str
    dtype: str
    provider: str
    median_us: float
    p20_us: float
    p80_us: float
    gbytes_per_s: float
    share_of_copy: float  # of the bandwidth of a plain copy of the same tensor
    times_eager: float  # how many times faster than the eager expression


def measure(call: Callable[[], object], seconds: float = 0.6) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile of a call in seconds.

    Short calls are repeated within one sample so that the clock does not matter.
    """
    call()
    start = time.perf_counter()
    call()
    once = time.perf_counter() - start
    inner = max(1, round(2e-4 / max(once, 1e-7)))
    samples: list[float] = []
    stop = time.perf_counter() + seconds
    while len(samples) < 7 or (time.perf_counter() < stop and len(samples) < 400):
        start = time.perf_counter()
        for _ in range(inner):
            call()
        samples.append((time.perf_counter() - start) / inner)
    cuts = statistics.quantiles(samples, n=5)
    return statistics.median(samples), cuts[0], cuts[3]


def compare(
    case: str,
    dtype: str,
    moved_bytes: int,
    copied: torch.Tensor,
    providers: dict[str, Callable[[], object]],
) -> list[Row]:
    """Time the providers of one case; the first is the baseline of `times_eager`.

    Args:
        case: id of the case.
        dtype: id of the dtype.
        moved_bytes: bytes the op must read and write at least.
        copied: tensor whose plain copy sets the bandwidth ceiling.
        providers: name -> call.
    """
    target = torch.empty_like(copied)
    ceiling = 2 * copied.nbytes / measure(lambda: target.copy_(copied))[0]
    rows: list[Row] = []
    for name, call in providers.items():
        median, low, high = measure(call)
        rate = moved_bytes / median
        base = rows[0].median_us / 1e6 if rows else median
        rows.append(
            Row(
                case,
                dtype,
                name,
                *(round(1e6 * t, 2) for t in (median, low, high)),
                round(rate / 1e9, 3),
                round(rate / ceiling, 3),
                round(base / median, 2),
            )
        )
    return rows


def machine() -> str:
    """File name of this machine's results."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"model name\s*:\s*(.*)", info.read_text())
        model = found.group(1) if found else model
    isa = doctor.doctor_report()["isa"]["used"] or "python"
    slug = re.sub(r"[^a-z0-9]+", "-", f"{model} {isa} {os.cpu_count()} cores".lower())
    return slug.strip("-")


def commit() -> str:
    """Commit measured, with -dirty where the tree differs from it."""
    git = ["git", "-C", str(RESULTS), "describe", "--always", "--dirty"]
    done = subprocess.run(git, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def save(op: str, rows: list[Row], *, path: Path | None = None, **facts: Any) -> Path:
    """Replace the run of `op` with these facts (such as threads) in the results of this machine."""
    path = path or RESULTS / f"{machine()}.json"
    runs = json.loads(path.read_text()) if path.exists() else []
    runs = [r for r in runs if r["op"] != op or any(r.get(k) != v for k, v in facts.items())]
    report = doctor.doctor_report()
    runs.append(
        {
            "op": op,
            **facts,
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "commit": commit(),
            "torch": report["versions"]["torch"],
            "isa": report["isa"]["used"],
            "devices": report["machine"]["devices"],
            "rows": [asdict(row) for row in rows],
        }
    )
    path.parent.mkdir(exist_ok=True)
    fresh = path.with_suffix(".tmp")
    fresh.write_text(json.dumps(runs, indent=1) + "\n")
    fresh.replace(path)
    return path


def table(rows: list[Row]) -> str:
    """Rows as a text table."""
    head = ("case", "dtype", "provider", "median us", "p20", "p80", "GB/s", "of copy", "x eager")
    cells = [
        (
            r.case,
            r.dtype,
            r.provider,
            f"{r.median_us:.1f}",
            f"{r.p20_us:.1f}",
            f"{r.p80_us:.1f}",
            f"{r.gbytes_per_s:.2f}",
            f"{r.share_of_copy:.0%}",
            f"{r.times_eager:.2f}",
        )
        for r in rows
    ]
    widths = [max(len(row[i]) for row in [head, *cells]) for i in range(len(head))]
    lines = []
    for row in [head, *cells]:
        left = [cell.ljust(w) for cell, w in zip(row[:3], widths[:3], strict=True)]
        right = [cell.rjust(w) for cell, w in zip(row[3:], widths[3:], strict=True)]
        lines.append("  ".join(left + right))
    return "\n".join(lines)
