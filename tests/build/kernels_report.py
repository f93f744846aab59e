# SPDX-License-Identifier: Apache-2.0
"""Print what every GPU kernel needs: `make kernels-report`. Exit code 1 if one spills."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # compiled code is wanted; read when kernels are defined
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import sidechain
from build import resources

CAPABILITIES = {80: "sm_80", 90: "sm_90a"}
DTYPES = (torch.float32, torch.bfloat16)  # float16 compiles as bfloat16 does


def cuda() -> list[resources.Kernel]:
    """Every kernel of the CUDA library, in all its architectures."""
    library = Path(sidechain.__file__).parent / "_C_cuda.abi3.so"
    if not library.exists():
        sys.exit("kernels-report: expected _C_cuda.abi3.so [built where nvcc is], got none")
    return resources.read(library)


def triton() -> list[resources.Kernel]:
    """Every Triton kernel at every configuration that the cases of its op launch."""
    from triton_support import CALLS, compiling_for

    found: dict[resources.Kernel, None] = {}
    for capability, arch in CAPABILITIES.items():
        with compiling_for(capability) as built:
            for dtype in DTYPES:
                for call in CALLS:
                    call.run(call.make(dtype, "cpu"), "triton")
        for _, kernel in built.kernels.values():
            meta = kernel.metadata
            sizes = {"threads": 32 * meta.num_warps, "shared": meta.shared}
            found[resources.read_cubin(kernel.asm["cubin"], arch, **sizes)] = None
    return sorted(found, key=lambda k: (k.name, k.arch, k.registers, k.shared))


def main() -> int:
    clean = True
    for title, kernels in (("CUDA", cuda()), ("Triton, different compilations", triton())):
        print(f"{title}: {len(kernels)}")
        print(resources.table(kernels))
        clean = clean and all(kernel.clean for kernel in kernels)
    print("no spills" if clean else "SPILLS")
    return int(not clean)


if __name__ == "__main__":
    sys.exit(main())
