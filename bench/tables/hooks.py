# SPDX-License-Identifier: Apache-2.0
"""What hooks, nnsight and taps add to a call of a site, and to whole denoiser steps."""

from __future__ import annotations

import pandas as pd

from .files import Results, Run
from .markdown import Section, machine, stamp

# A hook as one would write it, and the tap that does the same.
SAME = {
    "hook: mean": "tap: mean",
    "hook: add": "tap: steer",
    "hook: mean + add": "tap: mean + steer",
}


#: The same work in whole steps.
STEP = ("hooks: mean + add", "nnsight: mean + add", "taps: mean + steer")
EAGER, COMPILED, PEER = 0.03, 0.01, 5.0  # aims: share of a step, times less than nnsight


def section(results: Results) -> Section:
    """Microseconds that are added to one call of a site, and shares of a denoiser step."""
    found = Section("Taps against hand-written hooks and nnsight")
    for run in results.runs("hooks"):
        rows = _rows(run)
        whole = rows.case.str.match("step-|compiled-")
        _add_sites(found, run, rows[~whole])
        if whole.any():
            _add_steps(found, run, rows[whole])
    return found.measured("Hooks and taps", "make bench-hooks")


def _add_sites(found: Section, run: Run, rows: pd.DataFrame) -> None:
    added = _wide(rows, "added")
    slow = [
        (case, tap, added.loc[tap, case], added.loc[hook, case])
        for hook, tap in SAME.items()
        for case in added.columns
        if {hook, tap} <= set(added.index) and added.loc[tap, case] > added.loc[hook, case]
    ]
    found.add(
        "Microseconds that a hook or a tap adds to one call of a site with `R` rows, `T` "
        f"tokens and `C` channels; {stamp(run, 'make bench-hooks')}. Taps that add more than "
        f"the hook of the same work: {len(slow)} of {added.columns.size * len(SAME)}:",
        ("", *added.columns),
        ([name, *map(_whole, row)] for name, row in added.iterrows()),
    )
    found.losses += [
        f"{tap.removeprefix('tap: ')} at {case} adds {ours:.0f} us, a plain hook {theirs:.0f} "
        f"us ({machine(run)}, {run['date']})."
        for case, tap, ours, theirs in slow
    ]


def _add_steps(found: Section, run: Run, rows: pd.DataFrame) -> None:
    share, median = _wide(rows, "share"), rows.groupby("case", sort=False).bare.first()
    found.add(
        "Whole denoiser steps with a mean kept and a direction added at every site: what is added, "
        "in percent of the bare step. `nothing again` is the bare step once more: what is within "
        f"it is noise. `tracker`: a pipeline that is followed, without taps; "
        f"{stamp(run, 'make bench-hooks')}:",
        ("", *share.columns),
        [
            ["bare step, ms", *(f"{median[case] / 1000:.1f}" for case in share.columns)],
            *([name, *map(_percent, row)] for name, row in share.iterrows()),
        ],
    )
    hooks, peer, taps = (share.loc[name] if name in share.index else None for name in STEP)
    if taps is None:
        return
    for case in share.columns:
        aim = COMPILED if case.startswith("compiled-") else EAGER
        where = f"({machine(run)}, {run['date']})"
        if case.startswith(("step-zoo", "compiled-zoo")) and taps[case] > aim:
            found.losses.append(
                f"Taps add {taps[case]:.1%} to {case}, where {aim:.0%} is the aim {where}."
            )
        if hooks is not None and taps[case] > hooks[case]:
            found.losses.append(
                f"Taps add {taps[case]:.1%} to {case}, plain hooks {hooks[case]:.1%} {where}."
            )
        if peer is not None and PEER * max(taps[case], 0.0) > peer[case]:
            found.losses.append(
                f"Taps add {taps[case]:.1%} to {case}, nnsight {peer[case]:.1%}, where {PEER:g} "
                f"times less is the aim {where}."
            )


def _whole(value: float) -> str:
    return "-" if pd.isna(value) else f"{value:.0f}"


def _percent(value: float) -> str:
    return "-" if pd.isna(value) else f"{100 * value:+.1f}"


def _rows(run: Run) -> pd.DataFrame:
    """The rows of a run with what each way adds."""
    rows = pd.DataFrame(run["rows"])
    rows["added"] = [facts.get("added_us") for facts in rows.facts]
    rows["share"] = [facts.get("added_share") for facts in rows.facts]
    bare = rows[rows.provider.isin(["bare", "nothing"])].set_index("case").median_us
    rows["bare"] = rows.case.map(bare)
    return rows[~rows.provider.isin(["bare", "nothing"])]


def _wide(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    """Ways x cases, in the order of the file."""
    wide = rows.pivot(index="provider", columns="case", values=column)
    return wide.loc[rows.provider.unique(), rows.case.unique()].astype(float)
