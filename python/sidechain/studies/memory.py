# SPDX-License-Identifier: Apache-2.0
"""`--batch-rows auto`: how many samples fit the memory, from a run of one and a run of two."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path
from typing import Any

import torch

from .._errors import InputError
from .models import Subject
from .processes import Processes

#: Share of the free memory that a batch may take: taps, scorers and fragments need some too.
SHARE = 0.7
#: More rows than this gain nothing, and a cut-off run would lose more.
MOST = 128
_STEPS = 2
_LEAST = 1 << 20  # of a row, where the two runs show no difference
_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
    ),
)


def batch_rows(
    config: Any, subject: Subject, prompt: str, processes: Processes | None = None
) -> int:
    """Return the rows of a batch: those of the settings, or for "auto" as many as fit.

    rows = 2 + floor(0.7 free / (peak of two rows - peak of one)), at most 128; the
    processes of a run share what is free.

    Args:
        config: settings with batch_rows, guidance.
        subject: the model.
        prompt: to measure with.
        processes: of the run; all use the first one's number.

    Raises:
        InputError: "auto" on a device whose memory cannot be measured.
    """
    processes = processes or Processes()
    if config.batch_rows != "auto":
        return int(config.batch_rows)
    if torch.device(subject.device).type == "cuda":
        gauge: Any = _Gpu(torch.device(subject.device))
    else:
        gauge = _Cpu(subject.device)
    peaks = []
    for rows in (1, 1, 2):  # the first run also makes what stays: workspaces, caches
        gauge.reset()
        call = subject.call(_STEPS, config.guidance)
        subject.generate(subject.encode([prompt] * rows), list(range(rows)), **call)
        peaks.append(gauge.peak())
    return processes.agree(fitting(gauge.free() // processes.size, peaks[1], peaks[2]))


def fitting(free: int, one: int, two: int) -> int:
    """Return how many rows fit `free` bytes beside the two that have run.

    Args:
        free: bytes that are left while the memory of two rows is still held.
        one: peak of one row, in bytes.
        two: peak of two rows.
    """
    return min(MOST, 2 + int(SHARE * max(free, 0)) // max(two - one, _LEAST))


class _Gpu:
    def __init__(self, device: torch.device) -> None:
        self._device = device

    def reset(self) -> None:
        torch.cuda.synchronize(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)

    def peak(self) -> int:
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_allocated(self._device)

    def free(self) -> int:
        kept = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        # What is cached for two rows counts as theirs.
        return torch.cuda.mem_get_info(self._device)[0] + max(0, kept - self.peak())


class _Cpu:
    """Memory of this process as Linux counts it."""

    def __init__(self, device: str) -> None:
        if device != "cpu" or not Path("/proc/self/clear_refs").exists():
            raise InputError(
                f"--batch-rows auto: expected CUDA, or a CPU under Linux [where memory can be "
                f"measured], got {device}"
            )

    def reset(self) -> None:
        # Memory that was freed but is still held would be used again, and garbage that is collected
        # between two runs would lower the second peak: a row would look free.
        gc.collect()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
        Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        return _kilobytes("/proc/self/status", "VmHWM") << 10

    def free(self) -> int:
        free = _kilobytes("/proc/meminfo", "MemAvailable") << 10
        for limit, usage in _CGROUPS:
            if Path(limit).is_file() and Path(usage).is_file():
                most = Path(limit).read_text().strip()
                if most.isdigit():
                    free = min(free, int(most) - int(Path(usage).read_text()))
        return free


def _kilobytes(file: str, name: str) -> int:
    for line in Path(file).read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise InputError(f"--batch-rows auto: expected {name} in {file}, got none")
