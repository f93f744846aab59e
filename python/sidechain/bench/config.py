# SPDX-License-Identifier: Apache-2.0
"""Settings of `sidechain bench`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .. import _values as values
from .._options import Settings, choice, flag, number, path, text, whole

# Section -> seconds for each candidate, where nothing else is asked for. The demo runs once.
SECTIONS = {
    "ops": 0.6, "hooks": 0.6, "sae": 5.0, "store": 2.0, "sharing": 6.0, "generation": 4.0,
    "demo": 0.0,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class BenchSettings(Settings):
    """Options of `sidechain bench`.

    Attributes:
        section: "ops", every op against plain torch, eager and compiled; "hooks", taps against
            hand-written hooks; "sae", training steps and encoders of dictionaries and what a step
            needs, against plain torch and other packages; "store", reading and writing activations
            against plain copies and one file per tensor; "sharing", sweeps in one batch against
            one generation each; "generation", whole generations with taps, eager and in a CUDA
            graph, against plain ones; "demo", the demo from end to end.
        only: ops: those whose name holds this text; hooks: cases likewise; sae: shapes, or one of
            "steps", "encode", "memory"; store: sites, "read" or "write"; sharing: sweeps;
            generation: cases.
        seconds: time for each candidate; at least a few calls are timed. None = as the section has
            it.
        json: result file to merge the runs into, or a folder for `<machine>.json`. It is written
            after every row, whole, with the status "cut off" until the run is at its end.
    """

    section: str = choice(
        "ops", "what to time", tuple(SECTIONS), metavar="|".join(SECTIONS), positional=True
    )
    device: str = choice("cpu", "where", ("cpu", "cuda"))
    threads: int | None = whole(None, "of torch on the CPU (default: its own)", least=1)
    only: str = text(
        "", "ops or cases with this text; sae, store: or a part (default: all)", "TEXT", empty=True
    )
    seconds: float | None = number(
        None, "for each candidate (default 0.6; sae: 5; store: 2)", least=0.0
    )
    json: Path | None = path(
        None, "merge the result into this file, or one in this folder", "FILE", None
    )
    fresh: bool = flag("ops, sae, store: measure again what FILE holds for this commit")
    keep_failed: bool = flag("ops: do not try again what has failed")
    quick: bool = flag("tiny shapes: does it run? times mean nothing")
    compare: Path | None = path(None, "compare with this result file", "FILE", values.file_there)
