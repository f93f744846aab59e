# SPDX-License-Identifier: Apache-2.0
"""Correctness without pytest: `python -m sidechain.bench.small [--device cuda] [--only TEXT]`.

Every op's case table once, each backend of the device against the reference in float64: what a
sanitizer can watch, and what a host without the test packages can run. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

import torch

from . import ops


def prove(device: str, *, only: str = "", most: int | None = None) -> dict[str, Any]:
    """Check the small cases of the ops whose name holds a text.

    Args:
        device: "cpu" or "cuda".
        only: text in the op's name.
        most: cases of each op. None = all.

    Returns:
        ops {op: {backend: number of cases that passed}}; failed [[op, case, dtype, backend,
        error], ...].
    """
    passed: dict[str, dict[str, int]] = {}
    failed: list[list[str]] = []
    for module in ops.modules(only):
        counts = passed.setdefault(module.OP, {})
        for number, case in enumerate(module.small(device)):
            if most is not None and number >= most:
                break
            for candidate in case.candidates:
                try:
                    with torch.inference_mode(not case.grad):
                        case.check(candidate)
                    counts[candidate.name] = counts.get(candidate.name, 0) + 1
                except Exception as error:
                    what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                    failed.append([module.OP, case.name, case.dtype, candidate.name, what])
    return {"ops": passed, "failed": failed}


def main(argv: Sequence[str] | None = None) -> int:
    """Run and print; 1 if a case failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", default="")
    parser.add_argument("--most", type=int)
    options = parser.parse_args(argv)
    found = prove(options.device, only=options.only, most=options.most)
    for failure in found["failed"]:
        print("FAILED", *failure)
    print(json.dumps(found))
    return int(bool(found["failed"]))


if __name__ == "__main__":
    sys.exit(main())
