# SPDX-License-Identifier: Apache-2.0
"""What the bits of a run depend on beside its settings: processor, threads, torch, device."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch

from ... import _native


def machine(device: torch.device) -> dict[str, Any]:
    """Return what computes, as JSON values.

    Args:
        device: of the weights.

    Returns:
        instructions: what torch and our kernels use of the processor, such as "AVX512, avx512";
        threads; torch: its version; device: its kind, with the name of a GPU.
    """
    host = _native.host()
    own = "reference" if host is None or _native.absent("_C") is not None else host.best_isa()
    name = device.type
    if name == "cuda":
        name = f"cuda, {torch.cuda.get_device_name(device)}"
    return {
        "instructions": f"{torch.backends.cpu.get_cpu_capability()}, {own}",
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "device": name,
    }


def say_other_machine(known: Any, device: torch.device, step: int) -> None:
    """Say so in one line where a run goes on with other arithmetic than it began with.

    Sums are taken in another order there: the result is equal up to rounding, not bit for bit.

    Args:
        known: what `machine` returned when the checkpoint was written; older ones have nothing.
        device: of the weights.
        step: of the checkpoint.
    """
    now = machine(device)
    known = known if isinstance(known, Mapping) else {}
    other = [
        f"{name} {known[name]}, now {value}"
        for name, value in now.items()
        if name in known and known[name] != value
    ]
    if other:
        print(
            f"sidechain: note: the checkpoint of step {step} was written with {'; '.join(other)}: "
            "the result will be equal up to rounding, not bit for bit",
            file=sys.stderr,
        )
