# SPDX-License-Identifier: Apache-2.0
"""One row for each compiled kernel: what it needs and what its machine code does."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from build import loops, resources, sass
from build.launches import Launch
from build.resources import Kernel

WIDE = 16  # bytes of the widest access
SIZES = {"float": 4, "__half": 2, "__nv_bfloat16": 2}


@dataclass(frozen=True)
class Gpu:
    """What bounds a kernel: multiprocessors, their clock, bytes and matrix operations a second."""

    multiprocessors: int
    clock: float
    bytes_per_s: float
    flops: dict[str, float]

    def issue_share(self, moved: int, instructions: int) -> float:
        """Bytes a second that four schedulers can ask for in a loop, per byte that memory gives."""
        if not moved or not instructions:
            return 0.0
        iterations = self.multiprocessors * 4 * self.clock / instructions  # of a warp, a second
        return iterations * 32 * moved / self.bytes_per_s


SYSTEM = {"sm_90a": 1024}  # of a block's shared memory, in the figure of the compiled code
# Data sheets of the H100 SXM5 and the A100 SXM4 80 GB, dense; the clock is the one under load.
GPUS = {
    "sm_90a": Gpu(132, 1.755e9, 3.35e12, {"f32": 67e12, "f16": 989e12, "bf16": 989e12}),
    "sm_80": Gpu(108, 1.41e9, 2.039e12, {"f32": 19.5e12, "f16": 312e12, "bf16": 312e12}),
}


class LoopRow(NamedTuple):
    """One loop; bytes, instructions and loads of an iteration as in `Row`."""

    depth: int
    bytes: int
    instructions: int
    loads: int
    widths: tuple[int, ...]
    source: str


@dataclass(frozen=True)
class Row:
    """One kernel as compiled for one architecture.

    `static` and `dynamic` are bytes of shared memory, `threads` those of its largest launch in the
    bench. `narrowest` and `widest` are bytes of the global accesses in its loops, in all of its
    code where no loop moves any. The rest describes an iteration of the main loop, by one thread.
    """

    kernel: str
    arch: str
    registers: int
    stack: int
    static: int
    dynamic: int
    threads: int
    blocks: int
    occupancy: float
    narrowest: int
    widest: int
    instructions: int
    bytes: int
    per_element: float
    loads: int  # in flight at once
    flight: int  # bytes of them on a multiprocessor
    issue: float  # bytes that the instructions alone allow, per byte that memory gives
    loop: str  # line of the source that moves the most, or "no loop"
    narrow: dict[str, list[str]]  # bytes, below 16 -> lines with such accesses
    wide_bytes: int  # of `bytes`, those that move 16 at once
    launch: str  # the case whose launch it is; "" = none known
    loops: tuple[LoopRow, ...]  # outer ones first


def cuda(library: Path, launches: Iterable[Launch], arch: str = "") -> list[Row]:
    """Every kernel of a library, of one architecture or of all, or of a cubin.

    Kernels of internal linkage are in several files: equal ones get one row.
    """
    largest: dict[str, Launch] = {}
    for each in launches:
        known = largest.get(each.kernel)
        if known is None or _size(each) > _size(known):
            largest[each.kernel] = each
    used = {(k.name, k.arch): k for k in resources.read(library)}
    functions = sass.disassemble(library, arch)
    names = resources.demangled(f.symbol for f in functions)
    found: dict[tuple[Any, ...], Row] = {}
    for function in functions:
        name = names[function.symbol]
        kernel = used.get((name, function.arch)) or used[name, ""]  # a cubin names none
        launch = largest.get(kernel.name)
        dynamic = launch.shared if launch else 0
        threads = launch.threads if launch else kernel.threads
        what = f"{launch.case} {launch.dtype} {launch.what}" if launch else ""
        row = of(function, kernel, threads=threads, dynamic=dynamic, launch=what)
        key = tuple(v for k, v in asdict(row).items() if k not in {"narrow", "loop", "loops"})
        found[key] = row
    return sorted(found.values(), key=lambda r: (r.kernel, r.arch))


def cubin(code: bytes, *, name: str, element: int, threads: int, dynamic: int, launch: str) -> Row:
    """The one kernel of a cubin, as Triton compiles it, with what the file does not say."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(code)
        (function,) = sass.disassemble(path)
    kernel = resources.read_cubin(code, function.arch, threads=threads, shared=0)
    row = of(function, kernel, threads=threads, dynamic=dynamic, launch=launch, element=element)
    return replace(row, kernel=name)


def of(
    function: sass.Function,
    kernel: Kernel,
    *,
    threads: int,
    dynamic: int,
    launch: str = "",
    element: int | None = None,
) -> Row:
    """The row of a disassembled kernel whose resources are known."""
    found = loops.find(function)
    main = loops.main(found)
    where = (main.source or "a loop") if main else "no loop"
    accesses = [i for loop in loops.every(found) for i in loop.accesses]
    if main is None:
        main = loops.straight(function)
        accesses = main.accesses
    widths = {i.width for i in accesses}
    arch = function.arch
    whole = replace(kernel, arch=arch, threads=threads, shared=kernel.shared + dynamic)
    size = element or element_size(kernel.name)
    loads, flight = main.in_flight
    elements = main.bytes / size
    return Row(
        kernel=kernel.name,
        arch=arch,
        registers=kernel.registers,
        stack=kernel.stack + kernel.local,
        static=max(0, kernel.shared - SYSTEM.get(arch, 0)),
        dynamic=dynamic,
        threads=threads,
        blocks=whole.blocks,
        occupancy=whole.occupancy,
        narrowest=min(widths, default=0),
        widest=max(widths, default=0),
        instructions=main.instructions,
        bytes=main.bytes,
        per_element=round(main.instructions / elements, 2) if elements else 0.0,
        loads=loads,
        flight=flight * threads * whole.blocks,
        issue=round(GPUS[arch].issue_share(main.bytes, main.instructions), 3),
        loop=where,
        narrow=_narrow(accesses),
        wide_bytes=sum(i.width for i in main.path if i.width == WIDE),
        launch=launch,
        loops=tuple(_loop(loop) for loop in loops.every(found)),
    )


def element_size(name: str) -> int:
    """Bytes of the elements that a kernel is an instance for: its first template argument."""
    found = re.search(r"<(\w+)", name)
    return SIZES.get(found[1], 4) if found else 4


def _size(launch: Launch) -> tuple[bool, int, int]:
    """What the bench times comes before anything else, then the most threads."""
    return launch.what == "bench", launch.blocks * launch.threads, launch.shared


def _loop(loop: loops.Loop) -> LoopRow:
    widths = tuple(sorted({i.width for i in loop.accesses}))
    loads, _ = loop.in_flight
    return LoopRow(loop.depth, loop.bytes, loop.instructions, loads, widths, loop.source)


def _narrow(accesses: Iterable[sass.Instruction]) -> dict[str, list[str]]:
    lines: dict[int, set[str]] = {}
    for i in accesses:
        if i.width < WIDE:
            lines.setdefault(i.width, set()).add(i.source)
    return {str(width): sorted(lines[width]) for width in sorted(lines)}
