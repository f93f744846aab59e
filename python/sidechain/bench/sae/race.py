# SPDX-License-Identifier: Apache-2.0
"""Time and loss of one trainer after the other on the same batches, in turns with ours.

Only two trainers exist at a time, and a row is complete when its trainer is done: ratios come from
the steps of ours taken in between, so rows measured hours apart can stand in one table.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..cases import Row, reason
from ..machine import Machine
from ..results import Key
from ..shape import Shape
from . import peers
from .common import Batches, Start, Trainer, fvu, start
from .ours import OurTrainer
from .plain import DenseTrainer

SHAPES = {
    "cpu": (Shape(1024, 768, 12288, 32), Shape(1024, 1280, 5120, 10), Shape(1024, 2560, 10240, 64)),
    "cuda": (Shape(8192, 1280, 20480, 32), Shape(8192, 4096, 65536, 64)),
}
QUICK = (Shape(64, 32, 256, 4),)  # to see that everything runs
WARM = 1  # steps that are not timed: allocation, compilation
LEAST, MOST = 3, 20  # timed steps
PARITY_STEPS = WARM + LEAST  # steps of every trainer before the loss is compared
HELD_OUT, HELD_TOKENS = 10**6, 256  # number of the held-out batch, and its tokens
# A trainer counts if its loss has fallen as far as that of this one after the same tokens, up to
# this fraction. At (1024, 1280, 5120, 10) a learning rate of 0.8 is 25 % behind, a frozen encoder
# 75 %, no training 100 %; no correct trainer is 1 % behind.
REFERENCE = "dense fp32"
PARITY = 0.1
# A product this much slower than in float32 is emulated: nobody would train with it.
EMULATED = 8.0
LEAST_TOKENS = 8  # and twice as many: where an emulated step is extrapolated from

Make = Callable[[Shape, Start], Trainer]


@dataclass(frozen=True)
class Entry:
    """One trainer of the race.

    Attributes:
        name: of its row.
        kind: as in `Row`.
        make: (shape, start) -> trainer.
        bf16: its matrix products are in bfloat16.
    """

    name: str
    kind: str
    make: Make
    bf16: bool = False


def entries(device: str, *, compiled: bool = True) -> list[Entry]:
    """List all trainers, the reference first, then the most important ones.

    Args:
        device: "cpu" or "cuda".
        compiled: also those that need a compiler.
    """
    precisions = ("fp32", "int8") if device == "cpu" else ("fp32", "bf16")
    compilers = [
        Entry("bag compiled", "compiled", partial(DenseTrainer, compiled=True, bag=True)),
        Entry("dense compiled", "compiled", partial(DenseTrainer, compiled=True)),
    ]
    return [
        Entry(REFERENCE, "plain", DenseTrainer),
        *(Entry(f"ours {p}", "ours", partial(OurTrainer, precision=p)) for p in precisions),
        Entry("dense bf16", "plain", partial(DenseTrainer, precision="bf16"), bf16=True),
        Entry("ours autograd", "ours", partial(OurTrainer, path="autograd")),
        *(
            Entry(name, "peer", make, bf16=name.endswith("bf16"))
            for name, make in peers.CANDIDATES.items()
        ),
        Entry("embedding_bag", "plain", partial(DenseTrainer, bag=True)),
        *(compilers if compiled else []),
    ]


class Race:
    """Batches, start and timed reference step, common to the trainers of one shape.

    Args:
        shape: N, d, F, k.
        machine: where.
        seconds: for the timed steps of a trainer; `LEAST` are taken however long they last.
    """

    def __init__(self, shape: Shape, machine: Machine, seconds: float) -> None:
        self.shape, self.machine, self.seconds = shape, machine, seconds
        made = Batches(shape, machine.device)
        self.batches = [made[number] for number in range(WARM + MOST)]
        self.held = made[HELD_OUT][:HELD_TOKENS]
        self.begin = start(shape, machine.device)
        self.beside: Trainer | None = None

    def row(self, entry: Entry) -> Row:
        """Measure one entry; what fails keeps its row, with the reason.

        Returns:
            A row with the median of its steps. Facts: `ms beside`, median of the steps of ours in
            between; `x ours`, how many times longer its own took; `fvu` after `PARITY_STEPS`, and
            `at start`; `steps`; `tokens` of a step that was extrapolated.
        """
        shape = self.shape
        row = Row(shape.name, "f32", entry.name, entry.kind, shape.moved, shape.flops)
        if version := peers.version(entry.name):
            row.facts["version"] = version
        emulated = entry.bf16 and self._slowdown() > EMULATED
        if emulated and entry.kind == "peer":
            row.failed = f"bfloat16 is emulated here, {self._slowdown():.0f} times slower"
            return row
        trainer: Trainer | None = None
        try:
            trainer = entry.make(shape, self.begin)
            if self.beside is None:
                self.beside = OurTrainer(shape, self.begin)
                self.beside.step(self.batches[0])
            (self._extrapolate if emulated else self._train)(trainer, row)
        except Exception as error:
            row.failed = reason(error)
        finally:
            trainer = None
            if entry.kind == "compiled":
                torch.compiler.reset()
            gc.collect()
        return row

    def _slowdown(self) -> float:
        rates = self.machine.matrix_rates
        return rates["f32"] / rates["bf16"]

    def _train(self, trainer: Trainer, row: Row) -> None:
        assert self.beside is not None
        row.facts["at start"] = round(fvu(trainer, self.held), 6)
        taken: list[float] = []
        beside: list[float] = []
        for number, x in enumerate(self.batches):
            beside.append(self._timed(self.beside, x))
            taken.append(self._timed(trainer, x))
            if number + 1 == PARITY_STEPS:
                row.facts["fvu"] = round(fvu(trainer, self.held), 6)
            if number + 1 >= PARITY_STEPS and sum(taken[WARM:]) >= self.seconds:
                break
        _fill(row, taken[WARM:], beside[WARM:], "steps in turns")
        row.facts["steps"] = len(taken)

    def _extrapolate(self, trainer: Trainer, row: Row) -> None:
        """Extrapolate a step on N tokens linearly from steps on two smaller numbers of tokens."""
        assert self.beside is not None
        few, more = LEAST_TOKENS, 2 * LEAST_TOKENS
        taken: dict[int, list[float]] = {few: [], more: []}
        beside = []
        for x in self.batches[:PARITY_STEPS]:
            beside.append(self._timed(self.beside, x))
            for tokens, times in taken.items():
                times.append(self._timed(trainer, x[:tokens].clone()))
        slope = [(b - a) / (more - few) for a, b in zip(taken[few], taken[more], strict=True)]
        whole = [
            b + s * (self.shape.tokens - more) for b, s in zip(taken[more], slope, strict=True)
        ]
        _fill(row, whole[WARM:], beside[WARM:], f"extrapolated from {few} and {more} tokens")

    def _timed(self, trainer: Trainer, x: Tensor) -> float:
        self._wait()
        begun = time.perf_counter()
        trainer.step(x)
        self._wait()
        return time.perf_counter() - begun

    def _wait(self) -> None:
        if self.machine.device == "cuda":
            torch.cuda.synchronize()


def _fill(row: Row, taken: list[float], beside: list[float], method: str) -> None:
    cuts = statistics.quantiles(taken, n=5, method="inclusive")  # few: nothing beyond them
    times = (statistics.median(taken), cuts[0], cuts[3])
    row.median_us, row.p20_us, row.p80_us = (round(1e6 * t, 1) for t in times)
    row.tflops = round(row.flops / times[0] / 1e12, 4)
    row.method = method
    step = statistics.median(beside)
    # Four significant digits, so that a small ratio does not become zero.
    row.facts |= {"ms beside": round(1e3 * step, 2), "x ours": float(f"{times[0] / step:.4g}")}


def compare(rows: list[Row]) -> None:
    """Say who counts, and how many times faster each row is than the best others that do.

    Args:
        rows: of one shape, as far as they are measured; modified in place.
    """
    reference = next((r.facts for r in rows if r.provider == REFERENCE and not r.failed), None)
    timed = [row for row in rows if row.median_us]
    for row in timed:
        row.facts["counts"] = _counts(row.facts, reference)

    def best(*kinds: str) -> float | None:
        return min(
            (r.facts["x ours"] for r in timed if r.kind in kinds and r.facts["counts"] == "yes"),
            default=None,
        )

    plain, compiled, peer = best("plain"), best("compiled"), best("peer")
    bf16 = next((r.facts["x ours"] for r in timed if r.provider == "dense bf16"), None)
    for row in timed:
        own = row.facts["x ours"]
        row.times_plain = round(plain / own, 2) if plain else None
        row.times_compiled = round(compiled / own, 2) if compiled else None
        row.facts["x peer"] = round(peer / own, 2) if peer else None
        row.facts["x dense bf16"] = round(bf16 / own, 2) if bf16 else None


def _counts(facts: dict[str, float], reference: dict[str, float] | None) -> str:
    """Whether a row may be compared: "yes", "no", or "unknown" where a loss is missing."""
    if reference is None or "fvu" not in facts:
        return "unknown"
    way = reference["at start"] - reference["fvu"]
    return "yes" if facts["fvu"] <= reference["fvu"] + PARITY * way else "no"


def rows(
    machine: Machine,
    *,
    shapes: Iterable[Shape],
    seconds: float,
    kept: Mapping[Key, Row] | None = None,
    everybody: list[Entry] | None = None,
) -> Iterator[list[Row]]:
    """Measure every trainer on every shape.

    Args:
        machine: where.
        shapes: which.
        seconds: for the timed steps of one trainer.
        kept: rows that are there already and are not measured again; what failed is tried again.
        everybody: who. None = all `entries` of the device.

    Yields:
        One row as soon as it is measured. Its comparisons cover the rows so far and are updated
        when later rows come.
    """
    everybody = entries(machine.device) if everybody is None else everybody
    for shape in shapes:
        race: Race | None = None
        done: list[Row] = []
        for entry in everybody:
            row = (kept or {}).get((shape.name, "f32", entry.name))
            if row is None or row.failed:
                race = race or Race(shape, machine, seconds)
                row = race.row(entry)
            done.append(row)
            compare(done)
            yield [row]
