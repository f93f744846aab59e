# SPDX-License-Identifier: Apache-2.0
"""Memory of one step beyond weights and Adam state, each trainer in its own process.

`python -m sidechain.bench.sae.memory NAME N d F k DEVICE` prints the bytes of one trainer.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from ..cases import Row
from ..results import Key
from ..shape import Shape
from .common import Batches, start

STATUS, MEMINFO = Path("/proc/self/status"), Path("/proc/meminfo")
SHAPE = Shape(4096, 1024, 65536, 64)
DENSE = "dense fp32"
CANDIDATES = (DENSE, "eai-sparsify", "ours fp32")
# Matrices [N, F] of float32 that dense torch holds at its peak; it needs slightly more than 5.
DENSE_MATRICES = 6
PARTS = (8, 4)  # of N, where all of it does not fit


def extra_bytes(name: str, shape: Shape, device: str) -> int:
    """Return the peak of a step above what is held between steps.

    Args:
        name: of an entry of the race.
        shape: N, d, F, k.
        device: "cuda", or "cpu" on Linux, where the peak of the process can be reset.

    Raises:
        ValueError: no such entry.
    """
    from .race import entries

    found = [entry for entry in entries(device) if entry.name == name]
    if not found:
        raise ValueError(f"memory: expected an entry of the race, got {name!r}")
    trainer = found[0].make(shape, start(shape, device))
    few = Shape(8, shape.width, shape.features, shape.k)
    trainer.step(Batches(shape, device)[0][: few.tokens].clone())  # the first makes the Adam state
    x = Batches(shape, device)[1]
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        trainer.step(x)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")
    before = _field(STATUS, "VmRSS")
    trainer.step(x)
    return _field(STATUS, "VmHWM") - before


def rows(
    device: str,
    shape: Shape = SHAPE,
    kept: Mapping[Key, Row] | None = None,
    names: Iterable[str] | None = None,
) -> Iterator[list[Row]]:
    """Measure all candidates, each when it is asked for.

    Args:
        device: "cuda", or "cpu" on Linux.
        shape: N, d, F, k.
        kept: rows that are there already; what failed is tried again.
        names: of entries of the race. None = `CANDIDATES`.

    Yields:
        One row. Facts: `extra_mib`; `of dense`, the share of what dense float32 torch needs.
        Where dense torch does not fit, its row is a straight line through smaller N and says so.
    """
    dense: float | None = None
    for name in CANDIDATES if names is None else names:
        row = (kept or {}).get((shape.name, "f32", name))
        if row is None or row.failed:
            row = Row(shape.name, "f32", name, "memory", 0, 0, method="peak")
            try:
                found = _extrapolated(name, shape, device, row) or _of_process(name, shape, device)
                row.facts["extra_mib"] = round(found / 2**20, 1)
            except RuntimeError as error:
                row.failed = str(error)
        if name == DENSE:
            dense = row.facts.get("extra_mib")
        if dense and not row.failed:
            row.facts["of dense"] = round(row.facts["extra_mib"] / dense, 4)
        yield [row]


def _extrapolated(name: str, shape: Shape, device: str, row: Row) -> float | None:
    """Extrapolate the bytes of dense torch from smaller N; None where all of N fits."""
    matrix = 4 * shape.tokens * shape.features
    held = 4 * 4 * 2 * shape.features * shape.width  # weights, Adam state and gradients
    if name != DENSE or DENSE_MATRICES * matrix + held < _free(device):
        return None
    few, more = (replace(shape, tokens=shape.tokens // part) for part in PARTS)
    low, high = (_of_process(name, part, device) for part in (few, more))
    row.method = f"extrapolated from N={few.tokens} and {more.tokens}"
    return high + (high - low) / (more.tokens - few.tokens) * (shape.tokens - more.tokens)


def _free(device: str) -> int:
    return torch.cuda.mem_get_info()[0] if device == "cuda" else _field(MEMINFO, "MemAvailable")


def _of_process(name: str, shape: Shape, device: str) -> int:
    """Measure the bytes of one trainer in a separate process.

    Raises:
        RuntimeError: it failed, with the last line that it wrote.
    """
    arguments = [name, shape.tokens, shape.width, shape.features, shape.k, device]
    command = [sys.executable, "-W", "ignore", "-m", __name__, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["killed"])[-1][:160])
    return int(done.stdout.split()[-1])


def _field(file: Path, name: str) -> int:
    lines = file.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    name, *numbers, device = sys.argv[1:]
    torch.set_num_threads(1)
    print(extra_bytes(name, Shape(*map(int, numbers)), device))
