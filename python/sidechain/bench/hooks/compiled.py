# SPDX-License-Identifier: Apache-2.0
"""What taps add to whole denoiser steps under `torch.compile`, and how often they recompile.

Two copies of a model are compiled, one with taps in place and one without, and timed in turns. A
second copy without taps shows how far two equal copies lie apart.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from functools import partial

import torch

from ..cases import Row
from ..machine import Machine
from ..timing import Call, in_turns
from .models import Model, music
from .step import LONGER, ROUNDS, STEPS, Steps
from .ways import Way, rows_of

CASES: dict[str, Callable[[str], Model]] = {"compiled-zoo-R16": partial(music, 8)}
QUICK: dict[str, Callable[[str], Model]] = {"compiled-tiny-R2": partial(music, 1, tiny=True)}
NOTHING = "nothing"
KINDS = {"nothing again": "bare", "taps: mean + steer": "ours"}


def names(quick: bool) -> list[str]:
    """The cases; quick: a tiny model."""
    return list(QUICK if quick else CASES)


def measured(name: str, machine: Machine, seconds: float) -> list[Row]:
    """Check what is compared, then time it in turns.

    Raises:
        AssertionError: taps do something else when they are compiled.
    """
    model = {**CASES, **QUICK}[name](machine.device)
    apart = [Steps(copy.deepcopy(model)) for _ in range(2)]
    tapped = Steps(model)
    expected = tapped.check()
    for steps in (*apart, tapped):
        # The method, not a wrapper around the module: names of sites stay as they are.
        steps.model.denoiser.compile(fullgraph=True)
    with tapped.by_taps() as call:
        torch.testing.assert_close([call(), call()], expected, rtol=1e-3, atol=1e-4)
        recompiled = _recompiled(tapped, call)
        ways: dict[str, Way] = {
            NOTHING: apart[0].bare,
            "nothing again": apart[1].bare,
            "taps: mean + steer": lambda: contextlib.nullcontext(call),
        }
        taken = in_turns(ways, machine.device, LONGER * seconds, rounds=ROUNDS)
    rows = rows_of(name, taken, {NOTHING: "bare", **KINDS}, NOTHING)
    rows[-1].facts["recompiled"] = recompiled
    return rows


def _recompiled(tapped: Steps, call: Call) -> int:
    """Graphs that are made while strength, vector, step and generation change; the aim is none."""
    counters = torch._dynamo.utils.counters["stats"]
    before = int(counters["unique_graphs"])
    for strength, which in ((1.0, 0), (0.0, 0), (-2.5, -1), (2.0, 0)):
        tapped.steered.strength, tapped.steered.which = strength, which
        call()
    tapped.place = STEPS  # a new generation
    call()
    return int(counters["unique_graphs"]) - before
