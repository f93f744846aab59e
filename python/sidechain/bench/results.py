# SPDX-License-Identifier: Apache-2.0
"""Result files, one for each machine: merging of runs, tables and comparison."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sidechain

from .cases import Row

FORMAT = 2
# What makes two runs the same measurement: the newer one replaces the older.
IDENTITY = ("section", "op", "device", "threads")


def commit() -> str:
    """Return the commit that is measured; "-dirty" follows where the tree differs from it.

    Results themselves do not count as a difference: a bench writes them while it runs. A copied
    tree without its history names its commit in a file beside the package; without that file the
    answer is "installed".
    """
    folder = Path(sidechain.__file__).resolve().parent
    told = folder / "COMMIT"
    if told.is_file():
        return told.read_text().strip()
    name = _git(folder, "describe", "--always")
    if not name:
        return "installed"
    written = [
        f":(top,exclude){path}" for path in ("bench/results", "bench/RESULTS.md", "README.md")
    ]
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no", "--", ":/", *written)
    return f"{name}-dirty" if changed else name


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def new_run(
    section: str, op: str | None, facts: dict[str, Any], rows: Iterable[Row]
) -> dict[str, Any]:
    """Return a run as it is stored: what, when, where and the rows."""
    return {
        "section": section,
        "op": op,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": commit(),
        **facts,
        "rows": [asdict(row) for row in rows],
    }


def read(path: Path) -> list[dict[str, Any]]:
    """The runs of a file; none if it is not there.

    Raises:
        ValueError: not a result file of this format.
    """
    if not path.exists():
        return []
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"bench: expected results in JSON, got {path}: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"bench: expected results of format {FORMAT} in {path}, got {found}")
    runs: list[dict[str, Any]] = content["runs"]
    return runs


Key = tuple[str, str, str]  # case, dtype, provider


def kept(path: Path, run: dict[str, Any]) -> dict[Key, Row]:
    """Rows that a file holds of the same work at the same commit, on the same machine and versions.

    Args:
        path: of the file.
        run: what is about to be measured, without rows.

    Returns:
        (case, dtype, provider) -> row; none for a tree that differs from its commit, because the
        difference may be another one.
    """
    same = (*IDENTITY, "commit", "name", "versions")
    if run["commit"].endswith("-dirty"):
        return {}
    found = [r for r in read(path) if all(r.get(k) == run.get(k) for k in same)]
    rows = [Row(**row) for r in found for row in r["rows"]]
    return {(row.case, row.dtype, row.provider): row for row in rows}


def merge(path: Path, run: dict[str, Any]) -> None:
    """Put a run into a file in place of an older one of the same work.

    The file is replaced whole, so that an interrupted run loses nothing that was there.
    """
    runs = [r for r in read(path) if any(r.get(k) != run.get(k) for k in IDENTITY)]
    runs.append(run)
    runs.sort(key=lambda r: [str(r.get(k) or "") for k in IDENTITY])
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    fresh.write_text(_dump(runs))
    fresh.replace(path)


def _dump(runs: list[dict[str, Any]]) -> str:
    """JSON with one line for each row, so that a changed row is a changed line."""
    texts = []
    for run in runs:
        facts = json.dumps({k: v for k, v in run.items() if k != "rows"}, indent=1)
        rows = ",\n".join(f"  {json.dumps(row)}" for row in run.get("rows", []))
        texts.append(f'{facts[:-2]},\n "rows": [\n{rows}\n ]\n}}')
    return f'{{"format": {FORMAT}, "runs": [\n' + ",\n".join(texts) + "\n]}\n"


def table(rows: Sequence[Row]) -> str:
    """Format rows as text: time, rate, share of the limit, ratios, facts; losing rows stay."""
    facts = list(dict.fromkeys(name for row in rows for name in row.facts))
    head = ("case", "dtype", "provider", "median us", "p20", "p80", "issue us", "GB/s", "TFLOP/s",
            "of limit", "x plain", "x compiled", *facts)  # fmt: skip
    cells = [
        (
            r.case,
            r.dtype,
            r.provider,
            *(_figure(t, 1) for t in (r.median_us, r.p20_us, r.p80_us, r.issue_us)),
            _figure(r.gbytes_per_s, 2),
            _figure(r.tflops, 3),
            "" if r.share is None else f"{r.share:.0%}",
            _figure(r.times_plain, 2),
            _figure(r.times_compiled, 2),
            *(str(r.facts.get(name, "")) for name in facts),
        )
        for r in rows
    ]
    # Empty columns are left out.
    kept = [i for i in range(len(head)) if i < 3 or any(row[i] for row in cells)]
    text = _aligned([[line[i] for i in kept] for line in [head, *cells]], left=3)
    failed = [f"{r.case} {r.dtype} {r.provider}: failed: {r.failed}" for r in rows if r.failed]
    return "\n".join([text, *failed])


def line(row: Row) -> str:
    """Format one row as text, for rows that come one by one."""
    if row.failed:
        return f"{row.case}  {row.provider}: failed: {row.failed}"
    times = "" if row.median_us is None else f"{row.median_us / 1e3:.1f} ms  "
    facts = ", ".join(f"{name} {value}" for name, value in row.facts.items())
    return f"{row.case}  {row.provider}: {times}{row.method}  {facts}"


def comparison(runs: Sequence[dict[str, Any]], old: Sequence[dict[str, Any]]) -> str:
    """Compare rows with those of another file: both times, and how many times faster now."""
    then = {_key(run, row): (run, row) for run in old for row in run.get("rows", [])}
    cells: list[tuple[str, ...]] = []
    for run in runs:
        for row in run.get("rows", []):
            before = then.get(_key(run, row))
            if before is None or not row["median_us"] or not before[1]["median_us"]:
                continue
            times = before[1]["median_us"] / row["median_us"]
            cells.append(
                (row["case"], row["dtype"], row["provider"], f"{row['median_us']:.1f}",
                 f"{before[1]['median_us']:.1f}", f"{times:.2f}", before[0]["commit"])
            )  # fmt: skip
    if not cells:
        return "nothing in common with the file compared with"
    head = ("case", "dtype", "provider", "us now", "us then", "times faster", "then at")
    return _aligned([head, *cells], left=3)


def _key(run: dict[str, Any], row: dict[str, Any]) -> tuple[Any, ...]:
    return (run["section"], run.get("op"), row["case"], row["dtype"], row["provider"])


def _figure(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _aligned(lines: Sequence[Sequence[str]], left: int) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
