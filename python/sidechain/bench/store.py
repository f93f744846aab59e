# SPDX-License-Identifier: Apache-2.0
"""Reading and writing a store against plain copies and one file per tensor.

Reading: batches of 4096 rows from shards in the page cache into the same memory. `memcpy` copies
neighbouring rows, batch after batch, which is the ceiling; `index_select` and `take` gather the
same random rows as `gather`, and `batches` is the iterator of the store without its thread. Before
it is timed every way is compared with the rows that were written.

Writing: the output of a site for 8 samples at one step as one write, against one file for each
sample, without and with the fsync that makes a file survive a power cut; ours always syncs. The
temporary folder (TMPDIR) decides what is measured: a RAM disk shows the work, a disk the disk.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sidechain.store import ActivationStore, ActivationWriter, Permutation, Storage

from .cases import Row
from .machine import Machine
from .results import Key
from .timing import sampler, side_by_side

PARTS = ("read", "write")
BATCH = 4096
SAMPLES = 8
ROUNDS = 3  # of writing
READ_MIB, WRITE_MIB, PIECES = 512, 256, 200  # most that is read, is written, and in how many pieces


@dataclass(frozen=True)
class Site:
    """A site to store: samples of `tokens` rows of `width` values in float16."""

    what: str
    tokens: int
    width: int

    @property
    def name(self) -> str:
        """Readable id, with the bytes of a row."""
        return f"{self.what}-T{self.tokens}-C{self.width}"


SITES = (Site("zoo", 65, 160), Site("SDXL", 1024, 1280), Site("ACE-Step", 323, 2560))


def parts(
    machine: Machine, only: str, seconds: float
) -> Iterator[tuple[str, Callable[[Mapping[Key, Row]], Iterable[list[Row]]]]]:
    """List the parts of the section: name, and how to measure it given the rows already there.

    Args:
        machine: where; the CPU.
        only: the name of a part, or part of the name of a site; "" = everything.
        seconds: for each way to read.

    Raises:
        ValueError: nothing has this name, or another device.
    """
    if machine.device != "cpu":
        raise ValueError(f"bench: expected device cpu [section store], got {machine.device!r}")
    sites = [site for site in SITES if only in PARTS or only in site.name]
    if not sites:
        every = ", ".join([*PARTS, *(site.name for site in SITES)])
        raise ValueError(f"bench: expected a part or a site of store [{every}], got {only!r}")
    if only != "write":
        yield "read", lambda kept: _tables(sites, partial(reading, seconds=seconds), kept)
    if only != "read":
        yield "write", lambda kept: _tables(sites, writing, kept)


def _tables(
    sites: Iterable[Site],
    measure: Callable[[Site, Path], list[Row]],
    kept: Mapping[Key, Row],
) -> Iterator[list[Row]]:
    for site in sites:
        rows = [row for row in kept.values() if row.case == site.name]
        if not rows:
            with tempfile.TemporaryDirectory() as place:
                rows = measure(site, Path(place))
        yield rows


def fill(folder: Path, width: int, rows: int) -> Tensor:
    """Write a store of random rows and return them."""
    # Random bits of numbers in [0, 2): several times faster to draw than normal ones, all finite.
    bits = torch.randint(0, 0x4000, (rows, width), dtype=torch.int16)
    everything = bits.view(torch.float16)
    with ActivationWriter(folder, {"a": width}, Storage(shard_bytes=64 << 20)) as writer:
        for part in everything.split(8192):
            writer.write({"a": part})
    return everything


def reading(site: Site, folder: Path, seconds: float) -> list[Row]:
    """Time every way to read batches; fact `of memcpy`: share of its speed.

    Args:
        site: what is stored.
        folder: empty; it is filled.
        seconds: for each way.

    Raises:
        AssertionError: a way returned other rows than were written.
    """
    width = site.width
    rows = max(2, (READ_MIB << 20) // (2 * width) // BATCH) * BATCH
    everything = fill(folder, width, rows)
    ways = _ways_to_read(folder, everything)
    moved = BATCH * 2 * width
    timings = side_by_side({name: sampler([way], "cpu") for name, way in ways.items()}, seconds)
    limit = timings["memcpy"].median
    found = []
    for name, timing in timings.items():
        kind = "ours" if name in ("gather", "batches") else "plain"
        row = Row(site.name, "f16", name, kind, moved, 0, method=timing.method)
        times = (timing.median, timing.p20, timing.p80)
        row.median_us, row.p20_us, row.p80_us = (round(1e6 * t, 1) for t in times)
        row.gbytes_per_s = round(moved / timing.median / 1e9, 3)
        row.facts = {"of memcpy": round(limit / timing.median, 3)}
        found.append(row)
    return found


def _ways_to_read(folder: Path, everything: Tensor) -> dict[str, Callable[[], object]]:
    """Name -> a call that reads the next batch; each has been checked against `everything`."""
    rows, width = everything.shape
    store = ActivationStore(folder)
    store.verify()
    # The plain ways get all rows in one mapping, which a store does not have.
    whole = np.memmap(folder / "plain", np.float16, "w+", shape=(rows, width))
    whole[:] = everything.numpy()
    plain = torch.from_numpy(whole)
    order = Permutation(rows, 0)
    random = [order(np.arange(s, s + BATCH)) for s in range(0, rows, BATCH)]
    out = np.zeros((BATCH, 2 * width), np.uint8)
    target = torch.from_numpy(out).view(torch.float16)
    stream = iter(store.batches(BATCH, epochs=None, prefetch=0))

    def memcpy(n: int) -> Tensor:
        return target.copy_(plain[n * BATCH : (n + 1) * BATCH])

    def gather(n: int) -> Tensor:
        store.gather(order(np.arange(n * BATCH, (n + 1) * BATCH)), out)
        return target

    def index_select(n: int) -> Tensor:
        return torch.index_select(plain, 0, torch.from_numpy(random[n]), out=target)

    def take(n: int) -> Tensor:
        np.take(whole, random[n], 0, out=target.numpy(), mode="clip")
        return target

    def batches(n: int) -> Tensor:
        return next(stream).x

    ways = {
        "memcpy": memcpy, "gather": gather, "batches": batches, "index_select": index_select,
        "take": take,
    }  # fmt: skip
    for name, way in ways.items():
        target.zero_()
        # `batches` keeps its own position, so only the first batch can be compared.
        wanted = everything[:BATCH] if name == "memcpy" else everything[random[0]]
        if not torch.equal(way(0), wanted):
            raise AssertionError(f"{name}: expected the rows that were written, got others")
    return {name: _in_turn(way, len(random)) for name, way in ways.items()}


def _in_turn(way: Callable[[int], Tensor], count: int) -> Callable[[], Tensor]:
    """Return batch after batch, starting again after the last."""
    numbers = cycle(range(count))
    return lambda: way(next(numbers))


def writing(site: Site, folder: Path) -> list[Row]:
    """Time every way to write the same pieces, median of three; fact `x ours`: time over ours.

    Args:
        site: what is stored.
        folder: empty; it is used and emptied.
    """
    source = [torch.randn(SAMPLES, site.tokens, site.width).half() for _ in range(4)]
    pieces = max(4, min(PIECES, (WRITE_MIB << 20) // source[0].nbytes))
    ways: dict[str, Callable[[], None]] = {
        "store": partial(_write_store, folder, source, pieces),
        "files": partial(_write_files, folder, source, pieces, durable=False),
        "files, fsync": partial(_write_files, folder, source, pieces, durable=True),
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            begun = time.perf_counter()
            way()
            taken[name].append(time.perf_counter() - begun)
            for left in ("store", "files"):
                shutil.rmtree(folder / left, ignore_errors=True)
    moved = pieces * source[0].nbytes
    ours = statistics.median(taken["store"])
    found = []
    for name, times in taken.items():
        kind = "ours" if name == "store" else "plain"
        row = Row(site.name, "f16", name, kind, moved, 0, method=f"median of {ROUNDS}")
        median = statistics.median(times)
        row.median_us = round(1e6 * median, 1)
        row.p20_us, row.p80_us = (round(1e6 * t, 1) for t in (min(times), max(times)))
        row.gbytes_per_s = round(moved / median / 1e9, 3)
        row.facts = {"x ours": round(median / ours, 2)}
        found.append(row)
    return found


def _write_store(folder: Path, source: list[Tensor], pieces: int) -> None:
    with ActivationWriter(folder / "store", {"a": source[0].shape[-1]}) as writer:
        for n in range(pieces):
            writer.write({"a": source[n % len(source)].flatten(0, 1)}, step=n % 20, prompt=n)


def _write_files(folder: Path, source: list[Tensor], pieces: int, *, durable: bool) -> None:
    (folder / "files").mkdir()
    for n in range(pieces):
        for sample, tensor in enumerate(source[n % len(source)]):
            with open(folder / "files" / f"{n}-{sample}.pt", "wb") as file:
                torch.save(tensor.clone(), file)
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
