# SPDX-License-Identifier: Apache-2.0
"""What one step needs beyond weights and moments, each trainer in a process of its own.

`python -m sidechain.bench.sae.memory NAME N d F k DEVICE` prints the bytes of one trainer.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from ..cases import Row
from .common import Batches, Shape, start

SHAPE = Shape(4096, 1024, 65536, 64)
CANDIDATES = ("dense fp32", "embedding_bag", "eai-sparsify", "ours fp32")
AIM = 0.10  # of what dense torch needs


def extra_bytes(name: str, shape: Shape, device: str) -> int:
    """Peak of a step above what is held between steps.

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
    trainer.step(Batches(shape, device)[0][: few.tokens].clone())  # moments come with the first
    x = Batches(shape, device)[1]
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        trainer.step(x)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    trainer.step(x)
    return _status("VmHWM") - before


def rows(device: str, shape: Shape = SHAPE) -> list[Row]:
    """Measure all candidates; `x dense` is the share of what dense float32 torch needs."""
    rows = [Row(shape.name, "f32", name, "memory", 0, 0, method="peak") for name in CANDIDATES]
    for row in rows:
        arguments = [row.provider, shape.tokens, shape.width, shape.features, shape.k, device]
        command = [sys.executable, "-W", "ignore", "-m", __name__, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            row.failed = (done.stderr.strip().splitlines() or ["killed"])[-1][:160]
        else:
            row.facts = {"extra_mib": round(int(done.stdout.split()[-1]) / 2**20, 1)}
    dense = rows[0].facts.get("extra_mib")
    for row in rows:
        if dense and row.facts:
            row.facts["of dense"] = round(row.facts["extra_mib"] / dense, 3)
    return rows


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    name, *numbers, device = sys.argv[1:]
    torch.set_num_threads(1)
    print(extra_bytes(name, Shape(*map(int, numbers)), device))
