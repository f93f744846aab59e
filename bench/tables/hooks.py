# SPDX-License-Identifier: Apache-2.0
"""What hooks and taps add to a call."""

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


def section(results: Results) -> Section:
    """Microseconds that are added to one call of a site."""
    found = Section("Taps against hand-written hooks")
    for run in results.runs("hooks"):
        added = _added(run)
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
            ([name, *(f"{value:.0f}" for value in row)] for name, row in added.iterrows()),
        )
        found.losses += [
            f"{tap.removeprefix('tap: ')} at {case} adds {ours:.0f} us, a plain hook {theirs:.0f} "
            f"us ({machine(run)}, {run['date']})."
            for case, tap, ours, theirs in slow
        ]
    return found.measured("Hooks and taps", "make bench-hooks")


def _added(run: Run) -> pd.DataFrame:
    """Ways x cases, in the order of the file."""
    rows = pd.DataFrame(run["rows"])
    rows["added"] = [facts.get("added_us") for facts in rows.facts]
    rows = rows[rows.kind != "bare"]
    wide = rows.pivot(index="provider", columns="case", values="added")
    return wide.loc[rows.provider.unique(), rows.case.unique()]
