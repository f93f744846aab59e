# SPDX-License-Identifier: Apache-2.0
"""What this machine can do at best, measured: copy bandwidth and matrix rates.

Shares in the tables are of these figures and not of a data sheet.
"""

from __future__ import annotations

import os
import platform
import re
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from sidechain import doctor

from .timing import Sampler, measure, sampler, side_by_side

# Bytes read plus written by the copy, and the side of the square product: each fills its device.
COPY = {"cpu": 2**28, "cuda": 2**32}
MATRIX = {"f32": torch.float32, "bf16": torch.bfloat16}
# A CPU without bf16 instructions takes seconds for what a GPU does in a millisecond.
SIDE = {("cpu", "f32"): 1024, ("cpu", "bf16"): 512, ("cuda", "f32"): 8192, ("cuda", "bf16"): 8192}


class Machine:
    """One device of this machine, with limits that are measured on first use.

    Args:
        device: "cpu" or "cuda".
        seconds: time for each measurement.

    Raises:
        RuntimeError: no such device.
    """

    def __init__(self, device: str = "cpu", *, seconds: float = 0.3) -> None:
        if device == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("bench: expected a CUDA device [device='cuda'], got none")
        self.device = device
        self.seconds = seconds
        self._copies: dict[int, Sampler] = {}  # the last one

    @cached_property
    def name(self) -> str:
        """The device in words."""
        if self.device == "cuda":
            return torch.cuda.get_device_name()
        info = Path("/proc/cpuinfo")
        found = re.search(r"model name\s*:\s*(.*)", info.read_text()) if info.exists() else None
        return found.group(1) if found else platform.processor() or platform.machine()

    @property
    def slug(self) -> str:
        """File name of this machine's results."""
        words = self.name
        if self.device == "cpu":
            isa = doctor.doctor_report()["isa"]["used"] or "python"
            words = f"{words} {isa} {os.cpu_count()} cores"
        return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")

    def copy_size(self, moved: int) -> int:
        """Bytes, read plus written, of the copy that work moving so many bytes is compared with.

        On a CPU the copy is as large as the work, since a small one stays in cache; on a GPU
        buffers are rotated through memory, so that one large copy serves all.
        """
        largest = COPY[self.device]
        if self.device == "cuda":
            return largest
        return min(largest, max(moved, 4096) // 2 * 2)

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
            side = SIDE[self.device, name]
            # Random content: a product of zeros draws less power and runs faster.
            a, b = (torch.randn(side, side, device=self.device).to(dtype) for _ in range(2))
            out = torch.empty_like(a)
            spent = measure(lambda: torch.mm(a, b, out=out), self.device, self.seconds)  # noqa: B023
            rates[name] = 2 * side**3 / spent
        return rates

    def floor(self, copied: float, flops: int, dtype: str) -> tuple[float, str]:
        """Seconds some work takes at the limits of this machine, and the limit that binds.

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
        largest = COPY[self.device]
        copy = side_by_side({"": self.copy_sampler(largest)}, self.seconds)[""]
        limits = {"copy_gbytes_per_s": round(largest / copy.median / 1e9, 2)}
        for name, rate in self.matrix_rates.items():
            limits[f"{name}_matrix_tflops"] = round(rate / 1e12, 4)
        versions = report["versions"]
        return {
            "device": self.device,
            "name": self.name,
            "threads": torch.get_num_threads() if self.device == "cpu" else None,
            "isa": report["isa"]["used"] if self.device == "cpu" else None,
            "cores": report["machine"]["cores"],
            "versions": {
                "sidechain": versions["sidechain"],
                "python": report["machine"]["python"],
                "torch": versions["torch"],
                "triton": versions["triton"],
                "cuda": report["machine"]["cuda"],
            },
            "limits": limits,
        }
