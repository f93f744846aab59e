# SPDX-License-Identifier: Apache-2.0
"""Every configuration of every kernel compiles for GPUs that need not be here, without spills."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import shown
from build import kernel_rows
from build.kernel_rows import WIDE, Row
from build.resources import read_cubin
from sidechain.testing.cases import (
    ATTENTION_BENCH,
    TOPK_ENCODE_BENCH,
    TopkEncodeCase,
    encode_case,
)
from triton_support import CALLS, Built, compiling_for

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
                assert meta.enable_fp_fusion, f"{name}: left to Triton's version"
                sizes = {"threads": 32 * meta.num_warps, "shared": meta.shared}
                used = read_cubin(kernel.asm["cubin"], f"sm_{capability}", **sizes)
                if not used.clean or meta.shared > SHARED_LIMIT:
                    wrong.append((call.name, used))
                shown.CASES[f"triton cubin sm_{capability}: {name}"] += 1
    assert seen
    assert wrong == []


# Kernels without a 16-byte access in the loops of some compilation, and why.
NARROW = {
    "groups_kernel": "largest bounds of each group of features, once a call: 12 bytes a feature",
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
        shown.LINES.append(f"Triton access widths: {narrow:2} to {wide:2}  {name:22} {why}")
    assert {row.kernel for row in rows if row.widest < WIDE} == set(NARROW)


def _row(name: str, kernel: Any, dtype: torch.dtype) -> Row:
    meta = kernel.metadata
    sizes = {"threads": 32 * meta.num_warps, "dynamic": meta.shared, "element": dtype.itemsize}
    return kernel_rows.cubin(kernel.asm["cubin"], name=name, launch="", **sizes)


def test_every_launch_goes_through_one_function() -> None:
    """Which pins what Triton's versions disagree about, in the interpreter too."""
    bare, launched, kernels = [], set(), set()
    for path in (ROOT / "triton_kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                bare.append((path.name, ast.unparse(node.func)))
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "launch":
                launched.add(ast.unparse(node.args[0]))
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                kernels.add(node.name)
    assert bare == [("_launch.py", "kernel[grid]")]
    assert launched == kernels


def test_float16_compiles_as_bfloat16_does() -> None:
    """One case: the two differ in a type name only."""
    with compiling_for(90) as built:
        for call in CALLS:
            if call.name.startswith("everything"):
                call.run(call.make(torch.float16, "cpu"), "triton")
    assert all(k.asm["cubin"] for _, k in built.kernels.values())
    assert built.kernels


class TestTopkEncode:
    """What the sizes and the alignment of arguments compile."""

    BASE = TopkEncodeCase(16, 128, 12288, 8)
    # What differs from BASE -> kernels that are compiled for it, beside those of BASE.
    PATTERNS = (
        ({}, {}),
        ({"rows": 1}, {}),
        ({"rows": 17, "features": 20480, "k": 32}, {}),
        ({"offset": 8}, {}),  # 16 bytes further on
        ({"width": 160}, {"pack": 2}),  # a wider block
        ({"k": 100}, {"groups": 1, "maxima": 1, "list": 1, "full": 1}),  # smaller groups
        ({"features": 12291}, {"groups": 1, "maxima": 1, "list": 1, "full": 1}),
        ({"width": 100}, {"pack": 2, "value": 1, "full": 1}),
        ({"offset": 1}, {"pack": 2, "value": 1, "full": 1}),
        (
            {"width": 100, "features": 12291},
            {"pack": 2, "value": 1, "full": 1, "groups": 1, "maxima": 1, "list": 1},
        ),
    )

    def built(self, mode: str = "topk", offset: int = 0, **sizes: int) -> Built:
        case = replace(self.BASE, mode=mode, **sizes)
        args = case.make(torch.bfloat16)
        for name in ("x", "w_enc"):
            whole = torch.empty(args[name].numel() + offset, dtype=torch.bfloat16)
            args[name] = whole[offset:].view_as(args[name]).copy_(args[name])
        with compiling_for(90) as found:
            encode_case(args, backend="triton")
        return found

    def test_arguments_compile_few_kernels(self) -> None:
        known: set[str] = set(self.built().kernels)
        assert len(known) == 8
        for differs, expected in self.PATTERNS:
            new = {h: k for h, k in self.built(**differs).kernels.items() if h not in known}
            names = Counter(name.removesuffix("_kernel") for name, _ in new.values())
            assert names == expected, differs

    @pytest.mark.parametrize("mode", ["topk", "batch_topk"])
    def test_accesses_are_16_bytes_wide(self, mode: str) -> None:
        """In the loops over what is long: rows, products and the maxima of groups."""
        long = {"pack_kernel", "maxima_kernel", "value_kernel", "list_kernel", "pool_kernel"}
        for name, kernel in self.built(mode).kernels.values():
            if name in long:
                loads = re.findall(r"ld\.global\.(\S+)", kernel.asm["ptx"])
                assert loads.count("v4.b32") >= 2, (name, loads)
                # One row of x beside 16 of the dictionary, an element a thread.
                assert loads.count("b16") <= (name == "value_kernel"), (name, loads)
                assert not {"v2.b16", "v2.b32"} & set(loads), (name, loads)

    def test_misaligned_rows_are_read_element_by_element(self) -> None:
        read = Counter()
        for name, kernel in self.built(offset=1).kernels.values():
            read[name] += kernel.asm["ptx"].count("ld.global.b16")
        assert read["pack_kernel"] == 32  # 8 elements a thread, twice, in two kernels
        assert read["value_kernel"] == 17  # 16 rows of the dictionary and one of x

    @pytest.mark.parametrize("features", [1, 50, 300, 5120, 12288, 20480, 65536, 10**6])
    @pytest.mark.parametrize("k", [1, 4, 32, 500])
    def test_groups_and_chunks(self, features: int, k: int) -> None:
        from sidechain.triton_kernels import _topk_screen as screen

        by = screen.grouping(features, k)
        assert screen.TILE_FEATURES % (4 * by.size) == 0  # rows of maxima are 16 bytes apart
        assert by.size == 1 or features >= screen.SPREAD * k * by.size
        assert by.lanes <= screen.MOST_LANES
        for width in (64, 768, 4096):
            rows = screen.chunk_rows(features, width)
            held = 4 * rows * features + 2 * features * width
            assert held <= screen.L2_BYTES or rows == screen.LEAST_ROWS
