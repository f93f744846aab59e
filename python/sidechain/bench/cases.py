# SPDX-License-Identifier: Apache-2.0
"""A case: the same work done by several candidates. Checked first, then timed side by side."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch

from .machine import Machine
from .timing import Sampler, sampler, side_by_side

# plain: what one writes with torch alone; compiled: the same through torch.compile; bf16: plain,
# but less exact than asked for, so no baseline; peer: another package; ours: a backend of the op.
Kind = Literal["plain", "compiled", "bf16", "peer", "ours"]

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
    """

    name: str
    dtype: str
    make: Callable[[int], Any]
    candidates: tuple[Candidate, ...]
    check: Callable[[Candidate], dict[str, Any] | None]
    moved: int
    flops: int = 0
    grad: bool = False


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
    gbytes_per_s: float | None = None
    tflops: float | None = None
    share: float | None = None  # of the limit of this machine that binds
    bound: str = ""
    times_plain: float | None = None  # how many times faster than the best plain torch expression
    times_compiled: float | None = None  # and than the best compiled one
    facts: dict[str, Any] = field(default_factory=dict)
    failed: str = ""


def run_case(case: Case, machine: Machine, *, seconds: float = 0.6) -> list[Row]:
    """Check every candidate of a case, then time them in turns.

    Args:
        case: the work.
        machine: where, with its limits.
        seconds: time for each candidate.

    Returns:
        One row for each candidate. A candidate of others that cannot run keeps its row, with the
        reason in `failed`.

    Raises:
        AssertionError: one of ours computes something else.
    """
    rows = [
        Row(case.name, case.dtype, c.name, c.kind, case.moved, case.flops) for c in case.candidates
    ]
    args = [case.make(seed) for seed in range(_rotations(case, machine.device))]
    samplers: dict[str, Sampler] = {}
    for candidate, row in zip(case.candidates, rows, strict=True):
        try:
            with _mode(case):
                row.facts = case.check(candidate) or {}
                samplers[candidate.name] = sampler(
                    [partial(candidate.call, a) for a in args], machine.device
                )
        except Exception as error:
            if candidate.kind == "ours":
                raise
            row.failed = reason(error)
    with _mode(case):
        timings = side_by_side({COPY: machine.copy_sampler(case.moved), **samplers}, seconds)
    copied = timings[COPY].median * case.moved / machine.copy_size(case.moved)
    floor, bound = machine.floor(copied, case.flops, case.dtype)
    for row in rows:
        if row.provider not in timings:
            continue
        timing = timings[row.provider]
        row.median_us, row.p20_us, row.p80_us = (
            round(1e6 * t, 2) for t in (timing.median, timing.p20, timing.p80)
        )
        row.issue_us = None if timing.issue is None else round(1e6 * timing.issue, 2)
        row.method, row.bound = timing.method, bound
        row.gbytes_per_s = round(case.moved / timing.median / 1e9, 3)
        row.tflops = round(case.flops / timing.median / 1e12, 4) if case.flops else None
        row.share = round(floor / timing.median, 3)
    compare_rows(rows)
    return rows


def reason(error: Exception) -> str:
    """Why a row is empty, on one line."""
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
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return max(2, min(ROTATED, -(-2 * cache // max(case.moved, 1))))
