# SPDX-License-Identifier: Apache-2.0
"""Print what every GPU kernel needs and does, from its machine code: `make kernels-report`.

CONTRIBUTING, "Read a kernel's machine code", says what the columns mean. Exit code 1 if one spills.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # compiled code is wanted; read when kernels are defined
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import sidechain
from build import kernel_rows, launches, report_tables
from build.kernel_rows import Row

CAPABILITIES = {80: "sm_80", 90: "sm_90a"}
DTYPES = (torch.float32, torch.bfloat16)  # float16 compiles as bfloat16 does


LIBRARY = Path(sidechain.__file__).parent / "_C_cuda.abi3.so"


def triton(capabilities: Sequence[int]) -> list[Row]:
    """Every Triton kernel at every configuration that the cases of its op launch."""
    from triton_support import CALLS, compiling_for

    found: list[Future[Row]] = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # of processes that disassemble
        for capability in capabilities:
            with compiling_for(capability) as built:
                seen: set[str] = set()
                for dtype, call in itertools.product(DTYPES, CALLS):
                    call.run(call.make(dtype, "cpu"), "triton")
                    what = f"{str(dtype).removeprefix('torch.')}, {call.name}"
                    for key in [key for key in built.kernels if key not in seen]:
                        seen.add(key)
                        kernel = built.kernels[key]
                        found.append(pool.submit(_compiled, *kernel, what, dtype))
    return report_tables.numbered(each.result() for each in found)


def _compiled(name: str, kernel: Any, what: str, dtype: torch.dtype) -> Row:
    meta = kernel.metadata
    return kernel_rows.cubin(
        kernel.asm["cubin"],
        name=f"{name}<{what}>",
        element=dtype.itemsize,
        threads=32 * meta.num_warps,
        dynamic=meta.shared,
        launch=what,
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="kernels-report", description=__doc__)
    parser.add_argument("--only", default="", help="kernels whose name holds this text")
    parser.add_argument("--arch", default="sm_90a", help="sm_80, sm_90a (default) or all")
    parser.add_argument("--sort", default="kernel", help="column to sort by, worst first")
    parser.add_argument("--loops", action="store_true", help="every loop, by depth")
    parser.add_argument("--no-triton", action="store_true", help="CUDA only: no compilation")
    parser.add_argument(
        "--code", type=Path, default=LIBRARY, metavar="FILE", help="another library, or a cubin"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every row there")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="print before -> after")
    options = parser.parse_args(argv)
    if options.sort not in report_tables.COLUMNS:
        parser.error(f"--sort: expected one of {', '.join(report_tables.COLUMNS)}")

    if not options.code.exists():
        sys.exit(f"kernels-report: expected {options.code} [built where nvcc is], got none")

    known, calls = launches.record()
    every = {"CUDA": kernel_rows.cuda(options.code, known)}
    if options.code == LIBRARY and not options.no_triton:
        wanted = [c for c, arch in CAPABILITIES.items() if options.arch in ("all", arch)]
        every["Triton"] = triton(wanted)
    if options.json:
        text = {title: [asdict(row) for row in rows] for title, rows in every.items()}
        text["calls"] = [asdict(call) for call in calls]
        options.json.write_text(json.dumps(text, indent=1) + "\n")
    before = json.loads(options.compare.read_text()) if options.compare else {}

    def chosen(kernel: str, arch: str) -> bool:
        return options.arch in ("all", arch) and options.only in kernel

    for title, rows in every.items():
        shown = [row for row in rows if chosen(row.kernel, row.arch)]
        print(f"{title}: {len(shown)} kernels")
        if options.compare:
            old = [r for r in before.get(title, []) if chosen(r["kernel"], r["arch"])]
            print(report_tables.compared(old, shown))
        else:
            print(report_tables.kernels(shown, options.sort, loops=options.loops))
    if not options.compare:
        print(report_tables.calls(call for call in calls if options.only in call.op))
    dirty = [row.kernel for rows in every.values() for row in rows if row.stack]
    print(f"SPILLS: {', '.join(dirty)}" if dirty else "no spills")
    return int(bool(dirty))


if __name__ == "__main__":
    sys.exit(main())
