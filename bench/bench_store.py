# SPDX-License-Identifier: Apache-2.0
"""Reading and writing a store against plain copies and one file per tensor.

    python bench/bench_store.py [--folder DIR] [--mib N] [--seconds S] [--json FILE]

Reading: batches of 4096 rows from shards in the page cache into the same memory. `memcpy` copies
neighbouring rows, batch after batch, which is the ceiling; `index_select` and `take` gather the
same random rows as ours. Before it is timed every way is compared with the rows that were written.

Writing: the output of a site for 8 samples at one step as one write, against one file for each
sample, without and with the fsync that makes a file survive a power cut; ours always pays it. DIR
decides what is measured: a RAM disk shows the work, a disk shows the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sidechain.bench.machine import Machine
from sidechain.bench.timing import sampler, side_by_side
from sidechain.store import ActivationStore, ActivationWriter, Permutation

BATCH = 4096
SAMPLES = 8
# what it is like -> tokens of a sample, width
SITES = {"zoo": (65, 160), "SDXL": (1024, 1280), "ACE-Step": (323, 2560)}


def fill(folder: Path, width: int, rows: int) -> Tensor:
    """A store of random rows; returns them."""
    everything = torch.randn(rows, width).half()
    with ActivationWriter(folder, {"a": width}, shard_bytes=64 << 20) as writer:
        for part in everything.split(65536 // 8):
            writer.write({"a": part})
    return everything


def reading(folder: Path, width: int, mib: int, seconds: float) -> dict[str, Any]:
    """GB/s of every way to read batches."""
    rows = (mib << 20) // (2 * width) // BATCH * BATCH
    everything = fill(folder, width, rows)
    store = ActivationStore(folder, verify="full", damaged="error")
    # One mapping of everything in one piece: what the plain ways may have, and a store has not.
    whole = np.memmap(folder / "plain", np.float16, "w+", shape=(rows, width))
    whole[:] = everything.numpy()
    plain = torch.from_numpy(whole)
    order = Permutation(rows, 0)
    random = [order(np.arange(s, s + BATCH)) for s in range(0, rows, BATCH)]
    out = np.zeros((BATCH, 2 * width), np.uint8)
    target = torch.from_numpy(out).view(torch.float16)
    turn = 0

    def nth(step: int = 1) -> int:
        nonlocal turn
        turn = (turn + step) % len(random)
        return turn

    def memcpy(n: int) -> None:
        target.copy_(plain[n * BATCH : (n + 1) * BATCH])

    def ours(n: int) -> None:
        store.gather(order(np.arange(n * BATCH, (n + 1) * BATCH)), out)

    ways: dict[str, tuple[Callable[[int], Any], bool]] = {
        "memcpy": (memcpy, False),
        "ours": (ours, True),
        "index_select": (
            lambda n: torch.index_select(plain, 0, torch.from_numpy(random[n]), out=target),
            True,
        ),
        "take": (lambda n: np.take(whole, random[n], 0, out=target.numpy(), mode="clip"), True),
    }
    for name, (way, shuffled) in ways.items():
        target.zero_()
        way(1)
        wanted = everything[random[1]] if shuffled else everything[BATCH : 2 * BATCH]
        if not torch.equal(target, wanted):
            raise AssertionError(f"{name}: expected the rows that were written, got others")
    timings = side_by_side(
        {name: sampler([lambda w=way: w(nth())], "cpu") for name, (way, _) in ways.items()}, seconds
    )
    return {name: BATCH * 2 * width / timing.median / 1e9 for name, timing in timings.items()}


def writing(folder: Path, tokens: int, width: int, pieces: int) -> dict[str, Any]:
    """MB/s of every way to write the pieces, median of three."""
    source = [torch.randn(SAMPLES, tokens, width).half() for _ in range(4)]

    def ours() -> None:
        with ActivationWriter(folder / "store", {"a": width}) as writer:
            for n in range(pieces):
                writer.write({"a": source[n % 4].flatten(0, 1)}, step=n % 20, prompt=n)

    def files(durable: bool) -> None:
        (folder / "files").mkdir()
        for n in range(pieces):
            for sample, tensor in enumerate(source[n % 4]):
                with open(folder / "files" / f"{n}-{sample}.pt", "wb") as file:
                    torch.save(tensor.clone(), file)
                    if durable:
                        file.flush()
                        os.fsync(file.fileno())

    moved = pieces * source[0].nbytes
    found: dict[str, list[float]] = {"ours": [], "files": [], "files, fsync": []}
    for _ in range(3):
        for name, way in (
            ("ours", ours),
            ("files", lambda: files(False)),
            ("files, fsync", lambda: files(True)),
        ):
            start = time.perf_counter()
            way()
            found[name].append(moved / (time.perf_counter() - start) / 1e6)
            for left in ("store", "files"):
                shutil.rmtree(folder / left, ignore_errors=True)
    return {name: statistics.median(values) for name, values in found.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where to work; default: the temporary folder")
    parser.add_argument("--mib", type=int, default=1024, help="size of the store that is read")
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each way to read")
    parser.add_argument("--pieces", type=int, default=200, help="pieces that are written")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name, (tokens, width) in SITES.items():
        with tempfile.TemporaryDirectory(dir=options.folder) as place:
            folder = Path(place)
            read = reading(folder, width, options.mib, options.seconds)
            pieces = max(4, min(options.pieces, (256 << 20) // (SAMPLES * tokens * width * 2)))
            write = writing(folder, tokens, width, pieces)
        row = {"site": name, "tokens": tokens, "width": width, "read": read, "write": write}
        rows.append(row)
        print(f"{name}: rows of {2 * width} bytes, samples of {tokens} tokens")
        for way, rate in read.items():
            print(f"  read   {way:14} {rate:7.2f} GB/s  {rate / read['memcpy']:6.0%} of memcpy")
        for way, rate in write.items():
            print(f"  write  {way:14} {rate:7.0f} MB/s  ours {write['ours'] / rate:5.1f}x")
    if options.json:
        facts = Machine("cpu").facts()
        options.json.write_text(json.dumps({**facts, "store": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
