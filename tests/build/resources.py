# SPDX-License-Identifier: Apache-2.0
"""What every GPU kernel needs, read from compiled code: no GPU is asked."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

# Per multiprocessor, from the CUDA programming guide's table of compute capabilities.
REGISTERS, WARPS, BLOCKS = 65536, 64, 32
SHARED = {"sm_80": 164 * 1024, "sm_90a": 228 * 1024, "sm_90": 228 * 1024}
RESERVED = {"sm_80": 1024}  # the system's share of a block; from sm_90 on it is in the figure
REGISTER_UNIT = 256  # registers are handed out to a warp in this many


@dataclass(frozen=True)
class Kernel:
    """One kernel of one architecture; bytes, and threads of its largest block."""

    name: str
    arch: str
    registers: int
    stack: int
    local: int
    shared: int
    threads: int

    @property
    def clean(self) -> bool:
        """Whether nothing spills: spilled registers and indexed arrays live on the stack."""
        return self.stack == 0 and self.local == 0

    @property
    def occupancy(self) -> float:
        """Share of a multiprocessor's warps that fit at once, by registers and shared memory."""
        warps = -(-self.threads // 32)
        per_warp = -(-self.registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
        by_registers = REGISTERS // per_warp // warps
        block = self.shared + RESERVED.get(self.arch, 0)
        by_shared = SHARED[self.arch] // block if block else BLOCKS
        return min(by_registers, by_shared, BLOCKS, WARPS // warps) * warps / WARPS


def cuobjdump() -> str | None:
    """The tool of the CUDA toolkit, or the copy that ships with Triton; None without either."""
    found = shutil.which("cuobjdump")
    if found is None:
        try:
            from triton import knobs
        except ImportError:
            return None
        found = knobs.nvidia.cuobjdump.path
    return found


def read(path: Path) -> list[Kernel]:
    """Every kernel in a library or a cubin, sorted.

    Raises:
        RuntimeError: cuobjdump is missing.
    """
    threads = _threads(_dump("--dump-elf", path))
    found = _usage(_dump("--dump-resource-usage", path), threads)
    return sorted(found, key=lambda k: (k.name, k.arch))


def read_cubin(cubin: bytes, arch: str, *, threads: int, shared: int) -> Kernel:
    """The one kernel of a cubin, with what the file does not say.

    Args:
        cubin: as Triton compiles it.
        arch: what for.
        threads: of a block.
        shared: dynamic shared memory in bytes.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        (found,) = _usage(_dump("--dump-resource-usage", Path(file.name)), {})
    return replace(found, arch=arch, threads=threads, shared=found.shared + shared)


def _dump(option: str, path: Path) -> str:
    tool = cuobjdump()
    if tool is None:
        raise RuntimeError("kernels: expected cuobjdump [CUDA toolkit or Triton's wheel], got none")
    command = [tool, option, str(path)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def table(kernels: Iterable[Kernel]) -> str:
    """One line for each kernel."""
    lines = [f"{'registers':>9} {'shared':>7} {'stack':>5} {'threads':>7} {'occupancy':>9}  kernel"]
    lines += [
        f"{k.registers:9} {k.shared:7} {k.stack + k.local:5} {k.threads:7} {k.occupancy:9.0%}  "
        f"{k.arch:6} {k.name}{'' if k.clean else '   SPILLS'}"
        for k in kernels
    ]
    return "\n".join(lines)


def _usage(text: str, threads: dict[tuple[str, str], int]) -> Iterable[Kernel]:
    arch, name, known = "", "", _demangled(re.findall(r"Function (\S+):", text))
    for line in text.splitlines():
        if found := re.match(r"arch = (\S+)", line):
            arch = found[1]
        elif found := re.match(r" Function (\S+):", line):
            name = found[1]
        elif "REG:" in line:
            used = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
            yield Kernel(
                known[name], arch, used["REG"], used["STACK"], used["LOCAL"], used["SHARED"],
                threads.get((arch, name), 1024),
            )  # fmt: skip


def _threads(text: str) -> dict[tuple[str, str], int]:
    """(architecture, kernel) -> threads of the largest block, where the source bounds them."""
    found, arch, name = {}, "", ""
    lines = iter(text.splitlines())
    for line in lines:
        if match := re.match(r"arch = (\S+)", line):
            arch = match[1]
        elif match := re.match(r"\.nv\.info\.(\S+)", line):
            name = match[1]
        elif "EIATTR_MAX_THREADS" in line:
            next(lines)
            x, y, z = (int(n, 16) for n in re.findall(r"0x[0-9a-f]+", next(lines)))
            found[arch, name] = x * y * z
    return found


def _demangled(names: list[str]) -> dict[str, str]:
    tool = shutil.which("c++filt")
    if tool is None or not names:
        return {name: name for name in names}
    text = subprocess.run(
        [tool, *names], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    short = [re.sub(r"^void |sidechain::cuda::|\(.*", "", line) for line in text]
    return dict(zip(names, short, strict=True))
