# SPDX-License-Identifier: Apache-2.0
"""`sidechain bench`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..bench.config import BenchSettings
from .builder import Command


def run(settings: BenchSettings, given: Mapping[str, Any]) -> int:
    """Measure and print."""
    from ..bench import run as command

    return command.exit_code(command.run(settings))


COMMAND = Command(
    BenchSettings,
    run,
    "Measure what this machine can do at best (copy bandwidth, matrix rates), then run every op "
    "(ops), taps at a site (hooks) or SAE training steps (sae) beside what one would write in "
    "plain torch, eager and compiled; reading and writing activations beside plain copies and "
    "files (store); sweeps in one batch (sharing), whole generations (generation) or the demo "
    "(demo). Prints times, rates, shares of the limit and ratios; everything is checked for "
    "equal results. An interrupted run of sae or store continues when the same command is run "
    "again at the same commit.",
)
