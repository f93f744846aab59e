# SPDX-License-Identifier: Apache-2.0
"""No GPU kernel spills or moves its data piecemeal; test_loops.py tests what finds that out."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import shown
import sidechain
from build import kernel_rows, launches, resources, widths
from build.kernel_rows import Row
from build.launches import Call, Launch
from build.resources import Kernel
from sidechain.bench import ops

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = Path(sidechain.__file__).parent / "_C_cuda.abi3.so"
ARCHITECTURES = {"sm_80", "sm_90a"}

needs_tool = pytest.mark.skipif(
    resources.cuobjdump() is None or shutil.which("c++filt") is None,
    reason="cuobjdump comes with the CUDA toolkit or Triton, c++filt with binutils",
)


@pytest.fixture(scope="module")
def kernels() -> list[Kernel]:
    return resources.read(LIBRARY)


@needs_tool
@pytest.mark.skipif(not LIBRARY.exists(), reason="built without CUDA")
class TestCudaKernels:
    def test_none_spills_or_keeps_a_stack(self, kernels: list[Kernel]) -> None:
        assert [k for k in kernels if not k.clean] == []

    def test_every_kernel_of_the_sources_is_there(self, kernels: list[Kernel]) -> None:
        wanted = {
            name
            for source in (ROOT / "csrc" / "cuda").glob("*.cuh")
            for name in re.findall(
                r"__global__ void(?:\s+__launch_bounds__\([^)]*\))?\s+(\w+)\(", source.read_text()
            )
        }
        assert wanted
        for arch in ARCHITECTURES:
            built = {re.sub(r"<.*", "", k.name) for k in kernels if k.arch == arch}
            assert {n.split("::")[-1] for n in built} >= wanted, arch

    def test_every_kernel_fits(self, kernels: list[Kernel]) -> None:
        for kernel in kernels:
            assert kernel.occupancy > 0, kernel


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return kernel_rows.cuda(LIBRARY, [], "sm_90a")


@needs_tool
@pytest.mark.skipif(not LIBRARY.exists(), reason="built without CUDA")
class TestAccessWidths:
    """tests/build/widths.py says which accesses may be narrow, and why."""

    def test_loops_move_16_bytes_unless_a_line_says_why(self, rows: list[Row]) -> None:
        shown.LINES += [f"CUDA access widths: {line}" for line in widths.table(rows)]
        assert widths.refused(rows) == []

    def test_every_such_line_is_needed(self, rows: list[Row]) -> None:
        assert widths.unneeded(rows) == []

    def test_a_narrow_access_is_refused(self, rows: list[Row]) -> None:
        good = next(r for r in rows if r.kernel == "decode_kernel<float, 4, false>")
        known = set(widths.refused(rows))
        narrow = replace(good, narrow=good.narrow | {"1": ["sparse_decode.cuh:1"]})
        (message,) = set(widths.refused([narrow])) - known
        assert message.endswith("1 bytes at sparse_decode.cuh:1")
        scalar = replace(good, wide_bytes=good.bytes // 2 - 1)
        (message,) = set(widths.refused([scalar])) - known
        assert "of its main loop move 16 at a time" in message
        unaligned = replace(narrow, kernel="decode_kernel<float, 1, false>")
        assert widths.refused([unaligned]) == []

    def test_a_line_too_many_is_found(self, rows: list[Row]) -> None:
        others = [r for r in rows if not r.kernel.startswith("tap_fold_kernel")]
        gone = set(widths.unneeded(others)) - set(widths.unneeded(rows))
        assert gone
        assert all(line.startswith("tap_fold_kernel: ") for line in gone)


@pytest.fixture(scope="module")
def found() -> tuple[list[Launch], list[Call]]:
    return launches.record()


@needs_tool
@pytest.mark.skipif(not LIBRARY.exists(), reason="built without CUDA")
@pytest.mark.skipif(not launches.LIBRARY.exists(), reason="the emulation library is not built")
class TestLaunches:
    def test_every_kernel_is_launched(
        self, found: tuple[list[Launch], list[Call]], kernels: list[Kernel]
    ) -> None:
        assert {k.name for k in kernels} == {launch.kernel for launch in found[0]}

    def test_sizes_are_those_of_the_launchers(
        self, found: tuple[list[Launch], list[Call]], kernels: list[Kernel]
    ) -> None:
        bounds = {k.name: k.threads for k in kernels}
        for launch in found[0]:
            assert 0 < launch.threads <= bounds[launch.kernel], launch
        # The gradient of a row waits in shared memory, in float32.
        shared = {
            launch.shared
            for launch in found[0]
            if launch.kernel.startswith("decode_dvalues_kernel") and "-d2560-" in launch.case
        }
        assert shared == {4 * 2560}

    def test_every_call_of_the_bench_is_there(self, found: tuple[list[Launch], list[Call]]) -> None:
        wanted = {module.OP for module in ops.modules()}
        assert {call.op for call in found[1]} == wanted
        assert all(call.moved > 0 for call in found[1])


@pytest.mark.parametrize(
    ("registers", "shared", "threads", "arch", "expected"),
    [
        (32, 0, 256, "sm_80", 1.0),
        (128, 0, 512, "sm_80", 0.25),  # 16 warps x 4096 registers = all of them
        (64, 0, 1024, "sm_90a", 0.5),
        (16, 100 * 1024, 128, "sm_80", 4 / 64),  # one block by shared memory
        (16, 100 * 1024, 128, "sm_90a", 8 / 64),
        (16, 0, 32, "sm_80", 0.5),  # 32 blocks of one warp
        (16, 300 * 1024, 128, "sm_90a", 0.0),
    ],
)
def test_occupancy(registers: int, shared: int, threads: int, arch: str, expected: float) -> None:
    kernel = Kernel("k", arch, registers, 0, 0, shared, threads)
    assert kernel.occupancy == pytest.approx(expected)
