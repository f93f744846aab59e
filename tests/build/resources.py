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
    def blocks(self) -> int:
        """Blocks that a multiprocessor holds at once, by registers, shared memory and warps."""
        warps = -(-self.threads // 32)
        per_warp = -(-self.registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
        by_registers = REGISTERS // per_warp // warps
        block = self.shared + RESERVED.get(self.arch, 0)
        by_shared = SHARED[self.arch] // block if block else BLOCKS
        return min(by_registers, by_shared, BLOCKS, WARPS // warps)

    @property
    def occupancy(self) -> float:
        """Share of a multiprocessor's warps that its blocks fill."""
        return self.blocks * -(-self.threads // 32) / WARPS


def cuobjdump() -> str | None:
    """Path of the CUDA toolkit's tool, or of the copy in Triton's wheel; None without either."""
    return _find("cuobjdump")


def tool(name: str) -> str:
    """Path of cuobjdump or nvdisasm, which come together.

    Raises:
        RuntimeError: it is missing.
    """
    found = _find(name)
    if found is None:
        raise RuntimeError(f"kernels: expected {name} [CUDA toolkit or Triton's wheel], got none")
    return found


def _find(name: str) -> str | None:
    found = shutil.which(name)
    if found is None:
        try:
            from triton import knobs
        except ImportError:
            return None
        found = getattr(knobs.nvidia, name).path
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
    command = [tool("cuobjdump"), option, str(path)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _usage(text: str, threads: dict[tuple[str, str], int]) -> Iterable[Kernel]:
    arch, name, known = "", "", demangled(re.findall(r"Function (\S+):", text))
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


def demangled(symbols: Iterable[str]) -> dict[str, str]:
    """Symbol -> name with template arguments; symbols as they are where c++filt is missing."""
    symbols = list(symbols)
    found = shutil.which("c++filt")
    if found is None or not symbols:
        return {symbol: symbol for symbol in symbols}
    lines = subprocess.run(
        [found], input="\n".join(symbols), check=True, capture_output=True, text=True
    ).stdout.splitlines()
    return {s: short(line) for s, line in zip(symbols, lines, strict=True)}


def short(name: str) -> str:
    """A demangled name without result, namespaces of ours and parameters."""
    return re.sub(r"^void |sidechain::cuda::|\(.*", "", name)
