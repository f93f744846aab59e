# SPDX-License-Identifier: Apache-2.0
"""Cases: the same work done by several candidates, checked first and then timed in turns."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch

from . import profile
from .machine import Machine
from .timing import Sampler, Timing, sampler, side_by_side

# plain: what one writes with torch alone; compiled: the same through torch.compile; bf16: plain,
# but less exact than asked for, so no baseline; part: less than the whole work, a limit and no
# baseline; peer: another package; ours: a backend of the op.
Kind = Literal["plain", "compiled", "bf16", "part", "peer", "ours"]

COPY = "plain copy"  # sampled beside every case: the limit of what moves bytes
ROTATED = 64  # most sets of buffers a GPU case is rotated through


@dataclass(frozen=True)
class Candidate:
    """One way to do the work of a case; called with the arguments that `Case.make` returns."""

    name: str
    call: Callable[[Any], object]
    kind: Kind


@dataclass(frozen=True)
class Case:
    """Work of known size.

    Attributes:
        name: readable id, with the shape.
        dtype: id of the dtype ("f32", "bf16", ...).
        make: seed -> fresh arguments on the device of the case.
        candidates: ways to do it; a plain one first.
        check: raises AssertionError unless a candidate computes the right thing; may return facts
            for its row, such as a recall.
        moved: bytes that must be read and written, each input and output once.
        flops: operations of matrix products, 0 where there are none.
        grad: timed with autograd on.
        waits: why ours waits for the host and so cannot be captured in a CUDA graph; "" = it can,
            and a capture that fails is a failure of the case.
        rotations: sets of buffers on a GPU. None = as many as leave the second-level cache.
    """

    name: str
    dtype: str
    make: Callable[[int], Any]
    candidates: tuple[Candidate, ...]
    check: Callable[[Candidate], dict[str, Any] | None]
    moved: int
    flops: int = 0
    grad: bool = False
    waits: str = ""
    rotations: int | None = None


@dataclass
class Row:
    """One measured cell of a table; times in microseconds."""

    case: str
    dtype: str
    provider: str
    kind: str
    bytes: int
    flops: int
    median_us: float | None = None
    p20_us: float | None = None
    p80_us: float | None = None
    issue_us: float | None = None  # GPU: host time of one call
    method: str = ""
    capture: str = ""  # GPU: "captured", "failed: " and why, or "not promised: " and why
    gbytes_per_s: float | None = None
    tflops: float | None = None
    share: float | None = None  # of the limit of this machine that binds
    bound: str = ""
    times_plain: float | None = None  # how many times faster than the best plain torch expression
    times_compiled: float | None = None  # and than the best compiled one
    # GPU, ours: [name, median us of its launches in one call, the same in floors of the case]
    kernels: list[list[Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    failed: str = ""

    @property
    def broken(self) -> str:
        """Why our candidate in this row is wrong; "" where it is not."""
        if self.kind != "ours":
            return ""
        lost = f"capture {self.capture}" if self.capture.startswith("failed") else ""
        return self.failed or lost


def run_case(case: Case, machine: Machine, *, seconds: float = 0.6) -> list[Row]:
    """Check every candidate of a case, then time them in turns.

    Args:
        case: the work.
        machine: where, with its limits.
        seconds: time for each candidate.

    Returns:
        One row for each candidate. One that is wrong or cannot run keeps its row, with the reason
        in `failed`; `Row.broken` has the reason for ours.
    """
    rows = [
        Row(case.name, case.dtype, c.name, c.kind, case.moved, case.flops) for c in case.candidates
    ]
    try:
        args = [case.make(seed) for seed in range(_rotations(case, machine.device))]
    except Exception as error:
        for row in rows:
            row.failed = f"arguments: {reason(error)}"
        return rows
    samplers: dict[str, Sampler] = {}
    for candidate, row in zip(case.candidates, rows, strict=True):
        try:
            with _mode(case):
                row.facts = case.check(candidate) or {}
                samplers[candidate.name] = sampler(
                    [partial(candidate.call, a) for a in args],
                    machine.device,
                    promised=not _no_promise(case, candidate),
                )
        except Exception as error:
            row.failed = reason(error)
    try:
        with _mode(case):
            timings = side_by_side({COPY: machine.copy_sampler(case.moved), **samplers}, seconds)
    except Exception as error:  # the device is asynchronous: the candidate at fault is unknown
        for row in rows:
            row.failed = row.failed or f"timing: {reason(error)}"
        return rows
    copied = timings[COPY].median * case.moved / machine.copy_size(case.moved)
    floor, bound = machine.floor(copied, case.flops, case.dtype)
    for candidate, row in zip(case.candidates, rows, strict=True):
        if row.provider not in timings:
            continue
        _fill(row, timings[row.provider], floor, bound)
        if row.kind == "ours" and machine.device == "cuda":
            if excuse := _no_promise(case, candidate):
                row.capture = f"not promised: {excuse}"
            try:
                with _mode(case):
                    spent = profile.kernels(partial(candidate.call, args[0]))
                row.kernels = [[name, us, round(us / 1e6 / floor, 3)] for name, us in spent]
            except Exception as error:
                row.facts["profiler"] = reason(error)
    compare_rows(rows)
    return rows


def _no_promise(case: Case, candidate: Candidate) -> str:
    """Return why a candidate need not go into a CUDA graph; "" where it must."""
    if candidate.kind != "ours":
        return "not ours"
    return case.waits or ("the reference" if candidate.name == "reference" else "")


def _fill(row: Row, timing: Timing, floor: float, bound: str) -> None:
    row.median_us, row.p20_us, row.p80_us = (
        round(1e6 * t, 2) for t in (timing.median, timing.p20, timing.p80)
    )
    row.issue_us = None if timing.issue is None else round(1e6 * timing.issue, 2)
    row.method, row.capture, row.bound = timing.method, timing.capture, bound
    row.gbytes_per_s = round(row.bytes / timing.median / 1e9, 3)
    row.tflops = round(row.flops / timing.median / 1e12, 4) if row.flops else None
    row.share = round(floor / timing.median, 3)


def reason(error: Exception) -> str:
    """Return why a row is empty, in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def compare_rows(rows: Iterable[Row]) -> None:
    """Fill in how many times faster each row is than the best plain and the best compiled one."""
    rows = list(rows)

    def best(kind: str) -> float | None:
        return min((r.median_us for r in rows if r.kind == kind and r.median_us), default=None)

    plain, compiled = best("plain"), best("compiled")
    for row in rows:
        if row.median_us:
            row.times_plain = round(plain / row.median_us, 2) if plain else None
            row.times_compiled = round(compiled / row.median_us, 2) if compiled else None


@contextlib.contextmanager
def _mode(case: Case) -> Iterator[None]:
    with contextlib.nullcontext() if case.grad else torch.inference_mode():
        yield


def _rotations(case: Case, device: str) -> int:
    """Sets of buffers, so that together they are twice the second-level cache of a GPU.

    On a CPU one set: what an op works on was written by the layer before it.
    """
    if device == "cpu":
        return 1
    if case.rotations is not None:
        return case.rotations
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return max(2, min(ROTATED, -(-2 * cache // max(case.moved, 1))))
