# SPDX-License-Identifier: Apache-2.0
"""`sidechain bench`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import _values as values
from .._options import Settings, choice, flag, number, path, text, whole
from .builder import Command

SECTIONS = ("ops", "hooks", "sae", "store", "sharing", "generation")


@dataclass(frozen=True, kw_only=True)
class BenchSettings(Settings):
    """Options of `sidechain bench`."""

    section: str = choice(
        "ops", "what to time", SECTIONS, metavar="|".join(SECTIONS), positional=True
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


def run(settings: BenchSettings, given: Mapping[str, Any]) -> int:
    """Measure and print."""
    from ..bench import run as command

    runs = command.run(
        settings.section,
        device=settings.device,
        threads=settings.threads,
        only=settings.only,
        seconds=settings.seconds,
        fresh=settings.fresh,
        quick=settings.quick,
        keep_failed=settings.keep_failed,
        json=settings.json,
        compare=settings.compare,
    )
    return command.exit_code(runs)


COMMAND = Command(
    BenchSettings,
    run,
    "Measure what this machine can do at best (copy bandwidth, matrix rates), then run every op "
    "(ops), taps at a site (hooks) or SAE training steps (sae) beside what one would write in "
    "plain torch, eager and compiled; or reading and writing activations beside plain copies and "
    "files (store). Prints times, rates, shares of the limit and ratios; everything is checked for "
    "equal results. A run of sae or store that was cut off goes on where it was when the same "
    "command is called again at the same commit.",
)
