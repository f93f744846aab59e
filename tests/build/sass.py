# SPDX-License-Identifier: Apache-2.0
"""Machine code of kernels, read from nvdisasm: instructions, basic blocks and their successors."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from build import resources

LINE = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
LABEL = re.compile(r"(\S+):\s*$")
SECTION = re.compile(r'\s*\.section\s+\.text\.([^\s,"]+)')
SOURCE = re.compile(r'\s*//## File "(?:.*/)?([^"/]+)", line (\d+)')
# Code that moves data for its caller: of a line inlined from there the caller's is given.
HELPERS = re.compile(r"vec\.cuh|cuda_\w+\.hpp?|sm_\d+_\w+\.hpp?|device_\w+\.hpp?|standard\.py")
TARGET = re.compile(r"`\(([^)]+)\)")
TARGETS = re.compile(r'\(\*"BRANCH_TARGETS ([^"]*)"\*\)')
REGISTER = re.compile(r"(?<![\w.])R(\d+)\b(\.64)?")
# Global memory, and by generic addresses, which may be shared memory too.
GLOBAL_LOADS, GLOBAL_STORES = {"LDG", "LDGSTS"}, {"STG", "RED", "REDG", "ATOM", "ATOMG"}
GENERIC = {"LD", "ST"}
COPIES = {"UBLKCP", "UTMALDG", "UTMASTG", "UBLKRED", "UTMAREDG"}  # bulk: at least 16 bytes
SIZES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}


@dataclass(frozen=True)
class Instruction:
    """One instruction; `targets` are the labels it can go to."""

    guard: str  # predicate without "@"; "" = always
    name: str  # with modifiers: LDG.E.128
    operands: str
    targets: tuple[str, ...]
    source: str  # file:line, "" where the code says nothing

    @cached_property
    def kind(self) -> str:
        return self.name.split(".", 1)[0]

    @cached_property
    def conditional(self) -> bool:
        """Whether a branch may also go on with what follows it."""
        return bool(self.guard) or bool(TARGET.sub("", self.operands).strip(" ,"))

    @cached_property
    def width(self) -> int:
        """Bytes a thread moves to or from global (or generic) memory; 0 of other instructions."""
        if self.kind in COPIES:
            return 16
        if self.kind not in GLOBAL_LOADS | GLOBAL_STORES | GENERIC:
            return 0
        return next((SIZES[m] for m in self.name.split(".") if m in SIZES), 4)

    @property
    def generic(self) -> bool:
        return self.kind in GENERIC

    @property
    def loads(self) -> bool:
        return self.kind in GLOBAL_LOADS or self.kind == "LD"

    @cached_property
    def _split(self) -> tuple[str, str]:
        """The register written first, "" for none, and the operands that are read."""
        first, _, rest = self.operands.partition(",")
        if re.fullmatch(r"U?P\w+", first.strip()) and self.kind in {"ATOMG", "ATOM", "SHFL"}:
            first, _, rest = rest.partition(",")
        found = re.fullmatch(r"R\d+", first.strip())
        return (found[0], rest) if found else ("", self.operands)

    @cached_property
    def writes(self) -> frozenset[int]:
        """Numbers of the registers that a load fills, or of the first that others write."""
        register = self._split[0]
        if not register:
            return frozenset()
        first = int(register[1:])
        return frozenset(range(first, first + max(1, self.width // 4)))

    @cached_property
    def reads(self) -> frozenset[int]:
        """Numbers of the registers read; operands of several registers whole where it matters."""
        wide = {"HMMA": 4, "IMMA": 4, "QMMA": 4}.get(self.kind, 2 if self.kind[0] == "D" else 1)
        if self.kind in GLOBAL_STORES | GENERIC | {"STS"}:
            wide = max(1, next((SIZES[m] for m in self.name.split(".") if m in SIZES), 4) // 4)
        rest = self._split[1]
        addresses = "".join(re.findall(r"\[[^\]]*\]", rest))
        values = re.sub(r"\[[^\]]*\]", "", rest)
        found: set[int] = set()
        for text, alone in ((addresses, 1), (values, wide)):
            for number, pair in REGISTER.findall(text):
                found.update(range(int(number), int(number) + (2 if pair else alone)))
        return frozenset(found)


@dataclass
class Block:
    """Instructions that run one after the other, and the blocks that may follow."""

    code: list[Instruction] = field(default_factory=list)
    next: list[int] = field(default_factory=list)


@dataclass
class Function:
    """A kernel: blocks in the order of the code, the first is the entry."""

    symbol: str
    arch: str
    blocks: list[Block]
    labels: dict[str, int]  # label -> number of its block


def disassemble(path: Path, arch: str = "") -> list[Function]:
    """The kernels of a library, of every architecture unless one is given, or of a cubin.

    Raises:
        RuntimeError: cuobjdump or nvdisasm is missing.
    """
    if path.suffix == ".cubin":
        return list(_functions(_text(path)))
    found: list[Function] = []
    with tempfile.TemporaryDirectory() as folder:
        command = [resources.tool("cuobjdump"), "-xelf", "all", str(path.resolve())]
        subprocess.run(command, check=True, capture_output=True, cwd=folder)
        for cubin in sorted(Path(folder).glob(f"*.{arch.removesuffix('a')}*.cubin")):
            found += _functions(_text(cubin))
    return found


def _text(cubin: Path) -> str:
    command = [resources.tool("nvdisasm"), "-gi", "-c", str(cubin)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _functions(text: str) -> Iterator[Function]:
    arch = match[1] if (match := re.search(r"^\s*\.target\s+(\w+)", text, re.M)) else ""
    arch = "sm_90a" if arch == "sm_90" else arch  # tools before CUDA 13 leave out the "a"
    symbol, source, places = "", "", []
    code: list[Instruction | str] = []  # labels stand between the instructions
    for line in text.splitlines():
        if match := LINE.match(line):
            if places:  # the lines of a call chain, innermost first
                own = [p for p in places if not HELPERS.match(p)]
                source, places = (own or places)[0], []
            guard, name, operands = match.groups()
            listed = TARGETS.search(line)
            targets = (
                tuple(t.strip() for t in listed[1].split(","))
                if listed
                else tuple(TARGET.findall(operands))
            )
            code.append(Instruction(guard or "", name, operands, targets, source))
        elif match := SOURCE.match(line):
            places.append(f"{match[1]}:{match[2]}")
        elif match := SECTION.match(line):
            if code:
                yield _function(symbol, arch, code)
            symbol, source, places, code = match[1], "", [], []
        elif match := LABEL.match(line):
            code.append(match[1])
    if code:
        yield _function(symbol, arch, code)


def _function(symbol: str, arch: str, code: list[Instruction | str]) -> Function:
    blocks, labels = [Block()], {}
    for item in code:
        if isinstance(item, str):
            if blocks[-1].code:
                blocks.append(Block())
            labels[item] = len(blocks) - 1
            continue
        blocks[-1].code.append(item)
        if item.kind in {"BRA", "BRX", "JMP", "JMX", "EXIT", "RET", "BRXU"}:
            blocks.append(Block())
    for number, block in enumerate(blocks):
        follows = [number + 1] if number + 1 < len(blocks) else []
        block.next = _successors(symbol, block, labels, follows)
    return Function(symbol, arch, blocks, labels)


def _successors(symbol: str, block: Block, labels: dict[str, int], follows: list[int]) -> list[int]:
    if not block.code:
        return follows
    last = block.code[-1]
    if last.kind in {"EXIT", "RET"}:
        return follows if last.guard else []
    if last.kind not in {"BRA", "BRX", "BRXU", "JMP", "JMX"}:
        return follows
    if last.name.startswith("BRA.DIV"):
        return follows  # the other way is for a warp whose lanes have parted
    if not last.targets:
        raise RuntimeError(f"{symbol}: expected the targets of {last.name}, got {last.operands!r}")
    found = [labels[t] for t in last.targets]
    direct = last.kind == "BRA" or last.kind == "JMP"
    return list(dict.fromkeys(found + (follows if direct and last.conditional else [])))
