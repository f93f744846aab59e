# SPDX-License-Identifier: Apache-2.0
"""What the built libraries hold, read from the files; each test skips where its tool is absent."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

import sidechain

PACKAGE = Path(sidechain.__file__).parent
ROOT = Path(__file__).resolve().parents[2]
OBJECTS = ROOT / "build" / "cmake" / "CMakeFiles"
LIBRARIES = sorted(PACKAGE.glob("_C*.abi3.so"))


def output(*command: str | Path, **kw: object) -> str:
    return subprocess.run(
        [str(c) for c in command], check=True, capture_output=True, text=True, **kw  # type: ignore[call-overload]
    ).stdout  # fmt: skip


def tool(name: str) -> str:
    return shutil.which(name) or pytest.skip(f"{name} is not installed")


@pytest.mark.skipif(not LIBRARIES, reason="no native library is built")
class TestAbi:
    @pytest.mark.parametrize("library", LIBRARIES, ids=lambda p: p.name)
    def test_only_the_stable_abi_of_torch(self, library: Path) -> None:
        names = output(tool("nm"), "-D", "--undefined-only", "-C", library)
        assert "aoti_torch" in names or "torch_" in names
        leaked = [n for n in names.splitlines() if re.search(r"\b(at|c10|torch)::", n)]
        assert leaked == []
        assert not re.search(r"\bPy[A-Z_]", names), "a Python symbol ties the file to one Python"

    @pytest.mark.parametrize("library", LIBRARIES, ids=lambda p: p.name)
    def test_no_path_of_the_build_machine(self, library: Path) -> None:
        dynamic = output(tool("readelf"), "-d", library)
        assert "RPATH" not in dynamic
        assert "RUNPATH" not in dynamic


@pytest.mark.skipif(not OBJECTS.exists(), reason="no build folder")
class TestInstructionSets:
    WIDE = re.compile(r"%zmm|%k[0-7]\b|%[xy]mm(1[6-9]|2\d|3[01])\b")

    def disassembly(self, folder: str) -> str:
        objects = sorted((OBJECTS / folder).rglob("*.o"))
        if not objects:
            pytest.skip(f"{folder} is not built for this processor")
        return "".join(output(tool("objdump"), "-d", "--no-show-raw-insn", o) for o in objects)

    def test_avx512_only_in_its_objects(self) -> None:
        assert self.WIDE.search(self.disassembly("sidechain_kernels_avx512.dir"))
        for folder in ("sidechain_kernels_avx2.dir", "sidechain_kernels_baseline.dir",
                       "sidechain_cpu.dir", "_C.dir", "_host.dir"):  # fmt: skip
            assert not self.WIDE.search(self.disassembly(folder)), folder

    def test_avx_only_above_the_baseline(self) -> None:
        assert "%ymm" in self.disassembly("sidechain_kernels_avx2.dir")
        for folder in ("sidechain_kernels_baseline.dir", "sidechain_cpu.dir", "_C.dir"):
            assert "%ymm" not in self.disassembly(folder), folder

    @pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
    def test_kernels_share_no_symbol(self, isa: str) -> None:
        """A weak symbol compiled for one ISA could be the copy kept for all."""
        objects = sorted((OBJECTS / f"sidechain_kernels_{isa}.dir").rglob("*.o"))
        if not objects:
            pytest.skip(f"{isa} is not built for this processor")
        for o in objects:
            symbols = output(tool("nm"), "-C", o).splitlines()
            assert [s for s in symbols if re.search(r"\s[WVu]\s", s)] == []
            exported = [s for s in symbols if " T " in s]
            assert exported
            assert all(f"sidechain::cpu::{isa}::" in s for s in exported)


CUDA = PACKAGE / "_C_cuda.abi3.so"


def embedded_images(library: Path) -> set[tuple[str, int, str]]:
    """(kind, compute capability, suffix) of every device image in a library."""
    data, found = library.read_bytes(), set()
    for match in re.finditer(rb"\x50\xed\x55\xba\x01\x00\x10\x00", data):  # fat binary header
        start = match.start()
        at = start + 16
        end = at + struct.unpack_from("<Q", data, start + 8)[0]
        while at < end:
            kind, _, header, size = struct.unpack_from("<HHIQ", data, at)
            capability, flags = struct.unpack_from("<I8xI", data, at + 28)
            suffix = "a" if flags & 0x100000 else ""
            found.add(({1: "ptx", 2: "elf"}[kind], capability, suffix))
            at += header + size
    return found


@pytest.mark.skipif(not CUDA.exists(), reason="built without CUDA")
class TestCuda:
    def test_architectures(self) -> None:
        assert embedded_images(CUDA) == {("elf", 80, ""), ("elf", 90, "a"), ("ptx", 90, "")}

    def test_runtime_is_static(self) -> None:
        assert "libcudart" not in output(tool("readelf"), "-d", CUDA)


class TestPythonOnly:
    CODE = (
        "import json, torch, sidechain\n"
        "from sidechain.ops import Steering, backends, tap_\n"
        "x = torch.ones(1, 2, 3)\n"
        "tap_(x, steering=Steering(torch.ones(1, 1, 3), strength=torch.ones(1)))\n"
        "print(json.dumps([x.sum().item(), backends()['tap_']]))"
    )

    def run(self, **env: str) -> list[object]:
        full = os.environ | env
        return json.loads(output(sys.executable, "-c", self.CODE, env=full))

    def test_switched_off_at_run_time(self) -> None:
        total, tap = self.run(SIDECHAIN_NATIVE="0")
        assert total == 12.0
        assert isinstance(tap, dict)
        assert tap["reference"] is None
        assert tap["cpu"] == tap["cuda"] == "disabled by SIDECHAIN_NATIVE=0"

    def test_without_the_libraries(self, tmp_path: Path) -> None:
        copy = tmp_path / "sidechain"
        ignore = shutil.ignore_patterns("*.so", "__pycache__", "weights")
        shutil.copytree(PACKAGE, copy, ignore=ignore)
        total, tap = self.run(PYTHONPATH=str(tmp_path), SIDECHAIN_NATIVE="1")
        assert total == 12.0
        assert isinstance(tap, dict)
        assert tap["cpu"].startswith("not built")

    def test_broken_library_warns_and_falls_back(self, tmp_path: Path) -> None:
        copy = tmp_path / "sidechain"
        ignore = shutil.ignore_patterns("*.so", "__pycache__", "weights")
        shutil.copytree(PACKAGE, copy, ignore=ignore)
        (copy / "_C.abi3.so").write_bytes(b"not an ELF file")
        total, tap = self.run(
            PYTHONPATH=str(tmp_path), PYTHONWARNINGS="ignore", SIDECHAIN_NATIVE="1"
        )
        assert total == 12.0
        assert isinstance(tap, dict)
        assert tap["cpu"].startswith("cannot load _C.abi3.so")
