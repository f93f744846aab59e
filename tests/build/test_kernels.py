# SPDX-License-Identifier: Apache-2.0
"""No GPU kernel spills; the report that says so is itself tested on kernels that do."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import sidechain
from build import resources
from build.resources import Kernel

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = Path(sidechain.__file__).parent / "_C_cuda.abi3.so"
ARCHITECTURES = {"sm_80", "sm_90a"}

needs_tool = pytest.mark.skipif(
    resources.cuobjdump() is None, reason="cuobjdump comes with the CUDA toolkit or Triton"
)


@pytest.fixture(scope="module")
def kernels() -> list[Kernel]:
    return resources.read(LIBRARY)


@needs_tool
@pytest.mark.skipif(not LIBRARY.exists(), reason="built without CUDA")
class TestCudaKernels:
    def test_none_spills_or_keeps_a_stack(self, kernels: list[Kernel]) -> None:
        dirty = [k for k in kernels if not k.clean]
        assert dirty == [], "\n" + resources.table(dirty)

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


PLANTED = """
__global__ void __launch_bounds__(128) fine(float* x) { x[threadIdx.x] *= 2.0f; }
__global__ void __launch_bounds__(1024) spilling(float* x, int n) {
  float local[64];
  for (int i = 0; i < 64; ++i) local[i] = x[i * n];
  for (int i = 0; i < n; ++i) local[x[i] > 0 ? i % 64 : 3] += x[i];
  float sum = 0;
  for (int i = 0; i < 64; ++i) sum += local[i];
  x[threadIdx.x] = sum;
}
"""


@needs_tool
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_a_stack_frame_is_seen(tmp_path: Path) -> None:
    source, cubin = tmp_path / "k.cu", tmp_path / "k.cubin"
    source.write_text(PLANTED)
    command = ["nvcc", "-O3", "-cubin", "-arch=sm_80", "-o", str(cubin), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    fine, spilling = resources.read(cubin)
    assert fine.name == "fine"
    assert fine.clean
    assert (fine.threads, spilling.threads) == (128, 1024)
    assert not spilling.clean
    assert spilling.stack >= 256
    text = resources.table([fine, spilling]).splitlines()
    assert text[2].endswith("SPILLS")
    assert not text[1].endswith("SPILLS")


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
