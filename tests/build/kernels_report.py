# SPDX-License-Identifier: Apache-2.0
"""Print what every GPU kernel needs: `make kernels-report`. Exit code 1 if one spills."""

from __future__ import annotations

import sys
from pathlib import Path

import sidechain

sys.path.insert(0, str(Path(__file__).parent))
import resources


def main() -> int:
    library = Path(sidechain.__file__).parent / "_C_cuda.abi3.so"
    if not library.exists():
        print("CUDA: no library: built without nvcc", file=sys.stderr)
        return 1
    kernels = resources.read(library)
    print(f"CUDA, {len(kernels)} kernels in {library.name}")
    print(resources.table(kernels))
    return int(not all(kernel.clean for kernel in kernels))


if __name__ == "__main__":
    sys.exit(main())
