# SPDX-License-Identifier: Apache-2.0
"""All trainers on the same batches, one step each in turn: times, and the loss they reach."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from ..cases import Row
from ..machine import Machine
from . import peers
from .common import Batches, Shape, Start, Trainer, fvu, start
from .ours import OurTrainer
from .plain import DenseTrainer

SHAPES = {
    "cpu": (Shape(1024, 768, 12288, 32), Shape(1024, 1280, 5120, 10), Shape(1024, 2560, 10240, 64)),
    "cuda": (Shape(8192, 1280, 20480, 32), Shape(8192, 4096, 65536, 64)),
}
STEPS = 20
WARM = 3  # steps that are not timed: allocation, compilation
LEAST = 2  # timed steps of a trainer that is too slow for all
HELD_OUT = 10**6  # number of the batch that nobody trains on
# A trainer counts if it explains as much as this one after the same tokens, but for this share of
# the variance. It does all its steps, however slow it is: without its loss nobody counts.
REFERENCE = "dense fp32"
PARITY = 0.01

Make = Callable[[Shape, Start], Trainer]


@dataclass
class Entry:
    """One trainer of the race."""

    name: str
    kind: str
    make: Make
    trainer: Trainer | None = None
    seconds: list[float] = field(default_factory=list)
    spent: float = 0.0
    loss: float | None = None
    failed: str = ""


def entries(device: str) -> list[Entry]:
    """Everybody, plain torch first."""
    precisions = ("fp32", "bf16", "int8") if device == "cpu" else ("fp32", "bf16")
    return [
        Entry(REFERENCE, "plain", DenseTrainer),
        Entry("dense bf16", "plain", partial(DenseTrainer, precision="bf16")),
        Entry("embedding_bag", "plain", partial(DenseTrainer, bag=True)),
        Entry("dense compiled", "compiled", partial(DenseTrainer, compiled=True)),
        Entry("bag compiled", "compiled", partial(DenseTrainer, compiled=True, bag=True)),
        *(Entry(name, "peer", make) for name, make in peers.CANDIDATES.items()),
        Entry("ours autograd", "ours", partial(OurTrainer, path="autograd")),
        *(Entry(f"ours {p}", "ours", partial(OurTrainer, precision=p)) for p in precisions),
    ]


def race(
    shape: Shape, machine: Machine, everybody: list[Entry], *, steps: int = STEPS, limit: float
) -> list[Row]:
    """Train everybody on the same batches and compare time and loss.

    Args:
        shape: N, d, F, k.
        machine: where.
        everybody: who; a trainer that fails keeps its row, with the reason.
        steps: of each.
        limit: seconds after which a trainer is not asked for further steps; its loss is then not
            compared, and its row says how many steps it did. The reference does all.

    Returns:
        One row each. Facts: `fvu` after `steps`, `steps` done, `counts` ("no": another loss).
    """
    device = machine.device
    batches, begin = Batches(shape, device), start(shape, device)
    for entry in everybody:
        _attempt(entry, _begin, shape, begin)
    for number in range(steps):
        x = batches[number]
        for entry in everybody:
            if entry.spent <= limit or number < WARM + LEAST or entry.name == REFERENCE:
                _attempt(entry, _timed_step, x, device)
    for entry in everybody:
        if len(entry.seconds) == steps:
            _attempt(entry, _judge, batches[HELD_OUT])
        entry.trainer = None
    return _rows(shape, everybody)


def _attempt(entry: Entry, work: Callable[..., None], *args: Any) -> None:
    """Do something with an entry that has not failed."""
    if entry.failed:
        return
    try:
        work(entry, *args)
    except Exception as error:
        entry.failed = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        entry.trainer = None


def _begin(entry: Entry, shape: Shape, begin: Start) -> None:
    entry.trainer = entry.make(shape, begin)


def _judge(entry: Entry, x: torch.Tensor) -> None:
    assert entry.trainer is not None
    entry.loss = fvu(entry.trainer, x)


def _timed_step(entry: Entry, x: torch.Tensor, device: str) -> None:
    assert entry.trainer is not None
    _wait(device)
    begun = time.perf_counter()
    entry.trainer.step(x)
    _wait(device)
    entry.seconds.append(time.perf_counter() - begun)
    entry.spent += entry.seconds[-1]


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _rows(shape: Shape, everybody: list[Entry]) -> list[Row]:
    reference = next((e.loss for e in everybody if e.name == REFERENCE), None)
    rows = []
    for entry in everybody:
        row = Row(
            shape.name, "f32", entry.name, entry.kind, shape.moved, shape.flops, method="race",
            failed=entry.failed,
        )  # fmt: skip
        timed = entry.seconds[WARM:] or entry.seconds
        if timed and not entry.failed:
            cuts = statistics.quantiles(timed, n=5) if len(timed) > 1 else timed * 4
            times = (statistics.median(timed), cuts[0], cuts[3])
            row.median_us, row.p20_us, row.p80_us = (round(1e6 * t, 1) for t in times)
            row.tflops = round(shape.flops / times[0] / 1e12, 4)
            row.facts = {"fvu": None if entry.loss is None else round(entry.loss, 4)}
            row.facts |= {"steps": len(entry.seconds), "counts": _counts(entry.loss, reference)}
        rows.append(row)
    _compare(rows)
    return rows


def _counts(loss: float | None, reference: float | None) -> str:
    """Whether a row may be compared: "yes", "no", or "unknown" where a loss is missing."""
    if loss is None or reference is None:
        return "unknown"
    return "yes" if loss <= reference + PARITY else "no"


def _compare(rows: list[Row]) -> None:
    """How many times faster each row is than the best plain, compiled and peer row that counts.

    A trainer too slow for the loss to be known is slower than the best one anyway.
    """

    def best(*kinds: str) -> float | None:
        times = [
            r.median_us
            for r in rows
            if r.kind in kinds and r.median_us and r.facts["counts"] == "yes"
        ]
        return min(times, default=None)

    plain, compiled, peer = best("plain"), best("compiled"), best("peer")
    bf16 = next((r.median_us for r in rows if r.provider == "dense bf16"), None)
    for row in rows:
        if row.median_us:
            row.times_plain = round(plain / row.median_us, 2) if plain else None
            row.times_compiled = round(compiled / row.median_us, 2) if compiled else None
            row.facts["x peer"] = round(peer / row.median_us, 2) if peer else None
            row.facts["x dense bf16"] = round(bf16 / row.median_us, 2) if bf16 else None


def rows(
    machine: Machine, *, only: str = "", steps: int = STEPS, limit: float = 60.0
) -> Iterator[list[Row]]:
    """Race on every shape of the device whose name holds a text."""
    for shape in SHAPES[machine.device]:
        if only in shape.name:
            yield race(shape, machine, entries(machine.device), steps=steps, limit=limit)
