# SPDX-License-Identifier: Apache-2.0
"""What this machine can do at best, measured: copy bandwidth and matrix rates.

Shares in the tables are of these figures and not of a data sheet. `python -m
sidechain.bench.machine` prints them as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from sidechain import _native, doctor

from .timing import Sampler, measure, sampler, side_by_side

# Bytes read plus written by the copy, and the side of the square product: each fills its device.
COPY = {"cpu": 2**28, "cuda": 2**32}
MATRIX = {"f32": torch.float32, "bf16": torch.bfloat16}
# A CPU without bf16 instructions takes seconds for what a GPU does in a millisecond.
SIDE = {("cpu", "f32"): 1024, ("cpu", "bf16"): 512, ("cuda", "f32"): 8192, ("cuda", "bf16"): 8192}

CPUINFO = Path("/proc/cpuinfo")
# As csrc/cpu/isa.cpp decides, the widest first.
ISAS = {
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx2", "fma", "f16c"},
    "avx2": {"avx2", "fma", "f16c"},
    "baseline": set[str](),
}
# Read from a card, never set: its driver, and its state while a product runs.
QUERIED = (
    "name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem",
    "temperature.gpu", "power.draw", "power.limit",
)  # fmt: skip


def isa_of(cpuinfo: str, cap: str | None = None) -> str:
    """The instruction set that the CPU kernels choose on the processor of a /proc/cpuinfo.

    Args:
        cpuinfo: its text.
        cap: the highest that may be used. None = SIDECHAIN_ISA, if it names one.
    """
    found = re.search(r"^flags\s*:\s*(.*)", cpuinfo, re.MULTILINE)
    flags = set(found.group(1).split()) if found else set()
    names = list(ISAS)
    cap = os.environ.get("SIDECHAIN_ISA") if cap is None else cap
    allowed = names[names.index(cap) :] if cap in names else names
    return next(name for name in allowed if flags >= ISAS[name])


def card() -> dict[str, Any]:
    """Driver, clocks, temperature and power of the current CUDA device, or why they are unknown."""
    command = [
        "nvidia-smi", f"--query-gpu={','.join(QUERIED)}", "--format=csv,noheader,nounits",
        "-i", f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}",
    ]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"card": {"unknown": str(error)[:200]}}
    values = [value.strip() for value in done.stdout.partition("\n")[0].split(",")]
    if done.returncode or len(values) != len(QUERIED):
        return {"card": {"unknown": (done.stderr or done.stdout).strip()[:200]}}
    return {"card": dict(zip(QUERIED, values, strict=True))}


class Machine:
    """One device of this machine, with limits that are measured on first use.

    Args:
        device: "cpu" or "cuda".
        seconds: time for each measurement.
        quick: measure almost nothing, to see that it runs.

    Raises:
        RuntimeError: no such device.
    """

    def __init__(self, device: str = "cpu", *, seconds: float = 0.3, quick: bool = False) -> None:
        if device == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("bench: expected a CUDA device [device='cuda'], got none")
        self.device = device
        self.seconds = 0.0 if quick else seconds
        self.largest = 2**20 if quick else COPY[device]
        self.sides = {n: 64 if quick else SIDE[device, n] for n in MATRIX}
        self._copies: dict[int, Sampler] = {}  # the last one

    @cached_property
    def name(self) -> str:
        """Readable name of the device."""
        if self.device == "cuda":
            return torch.cuda.get_device_name()
        text = CPUINFO.read_text() if CPUINFO.exists() else ""
        found = re.search(r"model name\s*:\s*(.*)", text)
        return found.group(1) if found else platform.processor() or platform.machine()

    @cached_property
    def isa(self) -> str | None:
        """The instruction set that the CPU kernels use; None where the reference runs."""
        used: str | None = doctor.doctor_report()["isa"]["used"]
        if used is None and _native.absent("_C") is None:
            # The kernels are there, but the module that names their choice is for another Python.
            used = isa_of(CPUINFO.read_text() if CPUINFO.exists() else "")
        return used

    def alive(self) -> bool:
        """Whether the device still takes work: a kernel that fails badly ends its process."""
        if self.device == "cpu":
            return True
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return False
        return True

    @property
    def slug(self) -> str:
        """File name of this machine's results."""
        words = self.name
        if self.device == "cpu":
            words = f"{words} {self.isa or 'python'} {os.cpu_count()} cores"
        return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")

    def copy_size(self, moved: int) -> int:
        """Bytes, read plus written, of the copy to compare with work that moves so many bytes.

        On a CPU the copy is as large as the work, since a small one stays in cache; on a GPU
        buffers are rotated through memory, so that one large copy serves all.
        """
        if self.device == "cuda":
            return self.largest
        return min(self.largest, max(moved, 4096) // 2 * 2)

    def copy_sampler(self, moved: int) -> Sampler:
        """A plain copy of that size, ready to be timed."""
        size = self.copy_size(moved) // 2
        if size not in self._copies:
            source = torch.ones(size, dtype=torch.int8, device=self.device)
            target = torch.zeros_like(source)
            self._copies = {size: sampler([lambda: target.copy_(source)], self.device)}
        return self._copies[size]

    @cached_property
    def matrix_rates(self) -> dict[str, float]:
        """Operations per second of a square matrix product, by dtype."""
        rates = {}
        for name, dtype in MATRIX.items():
            side = self.sides[name]
            # Random content: a product of zeros draws less power and runs faster.
            a, b = (torch.randn(side, side, device=self.device).to(dtype) for _ in range(2))
            out = torch.empty_like(a)
            spent = measure(lambda: torch.mm(a, b, out=out), self.device, self.seconds)  # noqa: B023
            rates[name] = 2 * side**3 / spent
        return rates

    def floor(self, copied: float, flops: int, dtype: str) -> tuple[float, str]:
        """Return the least seconds for some work on this machine, and the limit that binds.

        Args:
            copied: seconds of a plain copy of the bytes it moves.
            flops: operations of matrix products; 0 where there are none.
            dtype: "f32"; anything narrower may use the faster of both rates.
        """
        if not flops:
            return copied, "memory"
        rates = self.matrix_rates
        matrix = flops / (rates["f32"] if dtype == "f32" else max(rates.values()))
        return (copied, "memory") if copied >= matrix else (matrix, "matrix")

    def facts(self) -> dict[str, Any]:
        """Limits and versions for the result file."""
        report = doctor.doctor_report()
        copy = side_by_side({"": self.copy_sampler(self.largest)}, self.seconds)[""]
        limits = {"copy_gbytes_per_s": round(self.largest / copy.median / 1e9, 2)}
        for name, rate in self.matrix_rates.items():
            limits[f"{name}_matrix_tflops"] = round(rate / 1e12, 4)
        versions = report["versions"]
        return {
            "device": self.device,
            "name": self.name,
            "threads": torch.get_num_threads() if self.device == "cpu" else None,
            "isa": self.isa if self.device == "cpu" else None,
            "cores": report["machine"]["cores"],
            "versions": {
                "sidechain": versions["sidechain"],
                "python": report["machine"]["python"],
                "torch": versions["torch"],
                "triton": versions["triton"],
                "cuda": report["machine"]["cuda"],
            },
            "limits": limits,
            **(card() if self.device == "cuda" else {}),
        }


def main(argv: Sequence[str] | None = None) -> int:
    """Print the facts of a device."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="measure for a moment only")
    options = parser.parse_args(argv)
    machine = Machine(options.device, seconds=0.5, quick=options.quick)
    print(json.dumps(machine.facts()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
