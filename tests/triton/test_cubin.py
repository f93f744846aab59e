# SPDX-License-Identifier: Apache-2.0
"""Every configuration of every kernel compiles for GPUs that need not be here, without spills."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from build import kernel_rows, widths
from build.kernel_rows import WIDE, Row
from build.resources import read_cubin
from sidechain.testing.cases import ATTENTION_BENCH, TOPK_ENCODE_BENCH
from triton_support import CALLS, compiling_for, ran

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
ROOT = Path(__file__).resolve().parents[2]
# What a block may hold on the smallest GPU of the family: 99 KiB on sm_86 and sm_89.
SHARED_LIMIT = 99 * 1024
KERNELS = sorted({c.op for c in CALLS})


def test_every_kernel_has_calls() -> None:
    files = {p.stem for p in (ROOT / "triton_kernels").glob("[!_]*.py")}
    assert files == set(KERNELS)


@pytest.mark.parametrize("capability", [80, 90], ids=["sm_80", "sm_90a"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("op", KERNELS)
def test_compiles_without_spills(op: str, dtype: torch.dtype, capability: int) -> None:
    wrong, seen, configs = [], set(), set()
    with compiling_for(capability) as built:
        for call in CALLS:
            config = call.config(dtype.itemsize)
            # float32 is not what runs on a GPU: one case per configuration is enough there.
            if call.op != op or (dtype == torch.float32 and config in configs):
                continue
            configs.add(config)
            call.run(call.make(dtype, "cpu"), "triton")
            for key in built.kernels.keys() - seen:
                seen.add(key)
                name, kernel = built.kernels[key]
                assert kernel.asm["cubin"]
                meta = kernel.metadata
                sizes = {"threads": 32 * meta.num_warps, "shared": meta.shared}
                used = read_cubin(kernel.asm["cubin"], f"sm_{capability}", **sizes)
                if not used.clean or meta.shared > SHARED_LIMIT:
                    wrong.append((call.name, used))
                ran[f"cubin sm_{capability}", name] += 1
    assert seen
    assert wrong == []


# Kernels without a 16-byte access in the loops of some compilation, and why.
NARROW = dict.fromkeys(
    ("pack_kernel", "screen_kernel", "full_kernel", "value_kernel"),
    "sizes are not specialised: no mask is known to be the same for a whole pack",
) | {
    "rank_kernel": "the values and indices found, one a thread",
    "tally_kernel": "counts of rows, one a thread",
    "write_kernel": "the values and indices found, one a thread",
}
TIMED = {case.name for case in ATTENTION_BENCH} | {
    f"{replace(case, rows=16, guess=None).name}-fp32" for case in TOPK_ENCODE_BENCH
}


def test_loops_move_16_bytes_unless_a_line_says_why() -> None:
    """At the sizes of the bench, each op in the dtype its figures are about."""
    kernels = {}
    with compiling_for(90) as built:
        for call in CALLS:
            dtype = torch.bfloat16 if call.op == "attention_tap" else torch.float32
            if call.name in TIMED:
                call.run(call.make(dtype, "cpu"), "triton")
                kernels |= {k: (*v, dtype) for k, v in built.kernels.items() if k not in kernels}
    rows = [_row(*kernel) for kernel in kernels.values()]
    for name in sorted({row.kernel for row in rows}):
        found = [row for row in rows if row.kernel == name]
        narrow, wide = min(r.narrowest for r in found), min(r.widest for r in found)
        why = NARROW.get(name, "-")
        widths.printed.append(f"Triton access widths: {narrow:2} to {wide:2}  {name:22} {why}")
    assert {row.kernel for row in rows if row.widest < WIDE} == set(NARROW)


def _row(name: str, kernel: Any, dtype: torch.dtype) -> Row:
    meta = kernel.metadata
    sizes = {"threads": 32 * meta.num_warps, "dynamic": meta.shared, "element": dtype.itemsize}
    return kernel_rows.cubin(kernel.asm["cubin"], name=name, launch="", **sizes)


def test_float16_compiles_as_bfloat16_does() -> None:
    """One case: the two differ in a type name only."""
    with compiling_for(90) as built:
        for call in CALLS:
            if call.name.startswith("everything"):
                call.run(call.make(torch.float16, "cpu"), "triton")
    assert all(k.asm["cubin"] for _, k in built.kernels.values())
    assert built.kernels
