# SPDX-License-Identifier: Apache-2.0
"""Medians of calls: a clock on the CPU, events or graph replays on a GPU.

Candidates are sampled in turns, so that a machine that slows down slows all of them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import cycle
from typing import Protocol

import torch

Call = Callable[[], object]

SHORTEST = 2e-4  # seconds of one CPU sample: in shorter ones the clock and the loop would show
GRAPH_BELOW = 5e-5  # GPU calls shorter than this are replayed from a graph: events resolve 0.5 us
ROUNDS = 5
LEAST, MOST = 7, 400


@dataclass(frozen=True)
class Timing:
    """Samples of one candidate in seconds per call."""

    median: float
    p20: float
    p80: float
    samples: int
    method: str
    issue: float | None = None  # GPU: what the host spends on one call
    capture: str = ""  # GPU: "captured", or "failed: " and why; "" where it was not tried


class Sampler(Protocol):
    """One candidate, warmed up."""

    @property
    def method(self) -> str:
        """How the time is taken: clock, events or graph."""

    @property
    def issue(self) -> float | None:
        """Host seconds of one call to an asynchronous device."""

    @property
    def capture(self) -> str:
        """Outcome of the capture in a CUDA graph; "" where none was tried."""

    def sample(self) -> float:
        """Seconds of one call."""


class ClockSampler:
    """Calls between two readings of the clock, repeated until a sample is long enough."""

    method = "clock"
    issue = None
    capture = ""

    def __init__(self, calls: Sequence[Call]) -> None:
        for call in calls:
            call()
        start = time.perf_counter()
        calls[0]()
        once = time.perf_counter() - start
        self._inner = max(1, round(SHORTEST / max(once, 1e-7)))
        self._next = cycle(calls)

    def sample(self) -> float:
        """Seconds of one call, the mean of a short run."""
        start = time.perf_counter()
        for _ in range(self._inner):
            next(self._next)()
        return (time.perf_counter() - start) / self._inner


class EventSampler:
    """One call between two events, the second-level cache emptied before each."""

    method = "events"
    capture = ""

    def __init__(self, calls: Sequence[Call]) -> None:
        for call in calls:
            call()
        torch.cuda.synchronize()
        self._next = cycle(calls)
        self.issue = issue_time(calls)
        cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self._flush = torch.empty(2 * cache, dtype=torch.int8, device="cuda")
        self._start = torch.cuda.Event(enable_timing=True)
        self._end = torch.cuda.Event(enable_timing=True)

    def sample(self) -> float:
        """Seconds on the device."""
        self._flush.zero_()
        self._start.record()
        next(self._next)()
        self._end.record()
        self._end.synchronize()
        return float(self._start.elapsed_time(self._end)) / 1e3


class GraphSampler:
    """All calls, one after the other on rotated buffers, in one graph: no launch gaps."""

    method = "graph"
    capture = "captured"

    def __init__(self, calls: Sequence[Call], repeats: int = 64) -> None:
        self._count = len(calls) * -(-repeats // len(calls))
        self.issue = issue_time(calls)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            for i in range(self._count):
                calls[i % len(calls)]()
        self._graph.replay()
        self._start = torch.cuda.Event(enable_timing=True)
        self._end = torch.cuda.Event(enable_timing=True)

    def sample(self) -> float:
        """Seconds of one call, the mean over a replay."""
        self._start.record()
        self._graph.replay()
        self._end.record()
        self._end.synchronize()
        return float(self._start.elapsed_time(self._end)) / 1e3 / self._count


def issue_time(calls: Sequence[Call], count: int = 100) -> float:
    """Host seconds to enqueue one call on an asynchronous device."""
    turn = cycle(calls)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        next(turn)()
    spent = (time.perf_counter() - start) / count
    torch.cuda.synchronize()
    return spent


def sampler(calls: Sequence[Call], device: str, *, promised: bool = False) -> Sampler:
    """Pick the way to time these calls.

    Args:
        calls: the same work on different buffers; they are warmed up here.
        device: "cpu" or "cuda".
        promised: they must go into a CUDA graph, however they are timed: try it.

    Returns:
        A sampler. A GPU call too short for events is replayed from a graph; one that cannot be
        captured (it synchronises) is timed by events, and `capture` says why.
    """
    if device == "cpu":
        return ClockSampler(calls)
    events = EventSampler(calls)
    short = statistics.median(events.sample() for _ in range(LEAST)) <= GRAPH_BELOW
    if not short and not promised:
        return events
    try:
        replayed = GraphSampler(calls) if short else GraphSampler(calls[:1], repeats=1)
    except RuntimeError as error:
        events.capture = "failed: " + " ".join(f"{type(error).__name__}: {error}".split())[:160]
        torch.cuda.synchronize()
        return events
    if short:
        return replayed
    events.capture = replayed.capture
    return events


def side_by_side(samplers: Mapping[str, Sampler], seconds: float = 0.6) -> dict[str, Timing]:
    """Sample every candidate in turns.

    Args:
        samplers: name -> candidate.
        seconds: time for each candidate; at least seven samples are taken of each.

    Returns:
        name -> median and percentiles.
    """
    taken: dict[str, list[float]] = {name: [] for name in samplers}
    for round_ in range(ROUNDS):
        for name, candidate in samplers.items():
            done = taken[name]
            wanted = -(-LEAST * (round_ + 1) // ROUNDS)
            stop = time.perf_counter() + seconds / ROUNDS
            while len(done) < wanted or (time.perf_counter() < stop and len(done) < MOST):
                done.append(candidate.sample())
    timings = {}
    for name, done in taken.items():
        cuts = statistics.quantiles(done, n=5)
        candidate = samplers[name]
        timings[name] = Timing(
            statistics.median(done), cuts[0], cuts[3], len(done), candidate.method,
            candidate.issue, candidate.capture,
        )  # fmt: skip
    return timings


@dataclass(frozen=True)
class Turns:
    """Samples of one candidate in seconds per call, those of a round together."""

    rounds: tuple[tuple[float, ...], ...]
    method: str

    @property
    def timing(self) -> Timing:
        """Medians of all samples."""
        taken = [sample for round_ in self.rounds for sample in round_]
        cuts = statistics.quantiles(taken, n=5, method="inclusive")
        return Timing(statistics.median(taken), cuts[0], cuts[3], len(taken), self.method)

    def added(self, to: Turns) -> float:
        """Seconds more than another candidate: the median over rounds, drift taken out."""
        pairs = zip(self.rounds, to.rounds, strict=True)
        return statistics.median(statistics.median(a) - statistics.median(b) for a, b in pairs)


def in_turns(
    ways: Mapping[str, Callable[[], AbstractContextManager[Call]]],
    device: str,
    seconds: float = 0.6,
    *,
    rounds: int = ROUNDS,
) -> dict[str, Turns]:
    """Sample every candidate in turns, each of them only while what it needs is attached.

    Every round starts with another candidate: what a predecessor leaves in caches and allocators,
    and a machine that slows down within a round, meet all of them.

    Args:
        ways: name -> a context that attaches something and gives what is to be timed.
        device: "cpu" or "cuda".
        seconds: time for each candidate; at least one sample is taken of each in a round.
        rounds: how often the candidates take turns.

    Returns:
        name -> samples. Attaching and the first two calls of a turn are not among them.
    """
    taken: dict[str, list[tuple[float, ...]]] = {name: [] for name in ways}
    methods = {}
    order = list(ways)
    for turn in range(rounds):
        first = turn % len(order)
        for name in order[first:] + order[:first]:
            with ways[name]() as call:
                candidate = sampler([call], device)
                methods[name] = candidate.method
                stop = time.perf_counter() + seconds / rounds
                done = [candidate.sample()]
                while time.perf_counter() < stop and len(done) < MOST:
                    done.append(candidate.sample())
            taken[name].append(tuple(done))
    return {name: Turns(tuple(found), methods[name]) for name, found in taken.items()}


def measure(call: Call, device: str = "cpu", seconds: float = 0.3) -> float:
    """Median seconds of one call."""
    return side_by_side({"": sampler([call], device)}, seconds)[""].median
