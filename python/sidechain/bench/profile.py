# SPDX-License-Identifier: Apache-2.0
"""Time of each kernel inside one call of an op, by the profiler of torch."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

CALLS = 5
LONGEST = 60  # letters of a name: template arguments say little more


def kernels(call: Callable[[], object]) -> list[tuple[str, float]]:
    """Measure the microseconds of each kernel in one call, the longest first.

    Args:
        call: work on the current CUDA device, warmed up.

    Returns:
        (name, median over a few calls of the time of all its launches); empty where the profiler
        sees no device, as in a container without its libraries.
    """
    spent: dict[str, list[float]] = defaultdict(list)
    for _ in range(CALLS):
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            call()
            torch.cuda.synchronize()
        for event in trace.key_averages():
            if event.self_device_time_total > 0:
                spent[short(event.key)].append(float(event.self_device_time_total))
    found = [(name, round(statistics.median(times), 2)) for name, times in spent.items()]
    return sorted(found, key=lambda pair: -pair[1])


def short(name: str) -> str:
    """Name of a kernel without return type, namespaces and what follows."""
    bare = name.removeprefix("void ").replace("(anonymous namespace)", "").split("(")[0]
    head, bracket, rest = bare.partition("<")
    return f"{head.split('::')[-1]}{bracket}{rest}"[:LONGEST]
