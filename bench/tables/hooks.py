# SPDX-License-Identifier: Apache-2.0
"""What hooks and taps add to a call of a site, and to whole denoiser steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd

from .files import Results, Row, Run
from .markdown import Section, figure, machine, stamp, times

# A hook as one would write it, and the tap that does the same.
SAME = {
    "hook: mean": "tap: mean",
    "hook: add": "tap: steer",
    "hook: mean + add": "tap: mean + steer",
}
STEPS = ("step-", "compiled-")  # how cases of whole steps begin; all others are sites
HOOKS, PEER, TAPS = "hooks: mean + add", "nnsight: mean + add", "taps: mean + steer"
# Most that taps may add to a step, and how many times as much nnsight has to add.
AIMS, PEER_AIM = {"step-": 0.03, "compiled-": 0.01}, 5.0
COMMAND = "make bench-hooks"


def section(results: Results) -> Section:
    """Microseconds at a site, and shares of a step."""
    found = Section("Taps against hand-written hooks")
    for run in results.runs("hooks"):
        _sites(found, run)
        _steps(found, run)
    return found.measured("Hooks and taps", COMMAND)


def _sites(found: Section, run: Run) -> None:
    """Microseconds that are added to one call of a site."""
    added = _added(run)
    slow = [
        (case, tap, added.loc[tap, case], added.loc[hook, case])
        for hook, tap in SAME.items()
        for case in added.columns
        if {hook, tap} <= set(added.index) and added.loc[tap, case] > added.loc[hook, case]
    ]
    found.add(
        "Microseconds that a hook or a tap adds to one call of a site with `R` rows, `T` "
        f"tokens and `C` channels; {stamp(run, COMMAND)}. Taps that add more than "
        f"the hook of the same work: {len(slow)} of {added.columns.size * len(SAME)}:",
        ("", *added.columns),
        ([name, *(_microseconds(value) for value in row)] for name, row in added.iterrows()),
    )
    found.losses += [
        f"{tap.removeprefix('tap: ')} at {case} adds {ours:.0f} us, a plain hook {theirs:.0f} "
        f"us ({machine(run)}, {run['date']})."
        for case, tap, ours, theirs in slow
    ]


def _added(run: Run) -> pd.DataFrame:
    """Ways x cases of sites, in the order of the file; NaN where a way could not run."""
    rows = pd.DataFrame([row for row in run["rows"] if not row["case"].startswith(STEPS)])
    rows["added"] = [facts.get("added_us") for facts in rows.facts]
    rows = rows[rows.kind != "bare"]
    wide = rows.pivot(index="provider", columns="case", values="added").astype(float)
    wide = wide.loc[rows.provider.unique(), rows.case.unique()]
    return wide.dropna(how="all")


def _microseconds(value: float) -> str:
    return "" if pd.isna(value) else f"{value:.0f}"


def _steps(found: Section, run: Run) -> None:
    """Shares that are added to whole steps."""
    cases: dict[str, dict[str, Row]] = {}
    for row in run["rows"]:
        if row["case"].startswith(STEPS):
            cases.setdefault(row["case"], {})[row["provider"]] = row
    if not cases:
        return
    absent = {row["failed"] for ways in cases.values() for row in ways.values() if row["failed"]}
    note = f" Not measured: {'; '.join(sorted(absent))}." if absent else ""
    found.add(
        "What the same adds to a whole step (denoiser, guidance, scheduler) at all sites: a mean "
        "is kept and a direction of the step added. Differences are taken within rounds in which "
        "the ways take turns; `nothing again` shows how exact they are. `tracker`: a pipeline that "
        f"is followed, without a tap; {stamp(run, COMMAND)}.{note} The aims: at most 3 % of an "
        "eager step and 1 % of a compiled one, no more than plain hooks, a fifth of nnsight:",
        ("case", "way", "ms a step", "adds us", "adds", "nnsight adds", "recompiled"),
        (_cells(case, ways, row) for case, ways in cases.items() for row in ways.values()),
    )
    where = f"({machine(run)}, {run['date']})."
    for case, ways in cases.items():
        found.losses += [f"{case}: {loss} {where}" for loss in _missed(case, ways)]


def _cells(case: str, ways: dict[str, Row], row: Row) -> list[str]:
    median = row["median_us"]
    facts = row["facts"]
    return [
        case,
        row["provider"],
        figure(median and median / 1e3, ".2f"),
        figure(facts.get("added_us"), ".0f"),
        figure(facts.get("added_share"), ".2%"),
        times(_peer_ratio(ways)) if row["provider"] == TAPS else "",
        "" if facts.get("recompiled") is None else str(facts["recompiled"]),
    ]


def _fact(ways: dict[str, Row], way: str, name: str) -> Any:
    return ways[way]["facts"].get(name) if way in ways else None


def _peer_ratio(ways: dict[str, Row]) -> float | None:
    """How many times as much nnsight adds; None where taps add nothing that can be measured."""
    peer, ours = (_fact(ways, way, "added_us") for way in (PEER, TAPS))
    return None if peer is None or ours is None or ours <= 0 else peer / ours


def _missed(case: str, ways: dict[str, Row]) -> Iterator[str]:
    """Sentences about the aims that taps miss in a case."""
    if TAPS not in ways:
        return
    share, ours = (_fact(ways, TAPS, name) for name in ("added_share", "added_us"))
    aim = next(limit for start, limit in AIMS.items() if case.startswith(start))
    if share is not None and share > aim:
        yield f"taps add {share:.1%} to a step, where {aim:.0%} is the aim"
    hooks = _fact(ways, HOOKS, "added_us")
    if hooks is not None and ours is not None and ours > hooks:
        yield f"taps add {ours:.0f} us to a step, plain hooks {hooks:.0f} us"
    ratio = _peer_ratio(ways)
    if ratio is not None and ratio < PEER_AIM:
        yield f"nnsight adds {ratio:.1f} times what taps add to a step, where 5 is the aim"
    if _fact(ways, TAPS, "recompiled"):
        yield f"{_fact(ways, TAPS, 'recompiled')} graphs were made again, where none is the aim"
