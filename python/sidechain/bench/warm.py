# SPDX-License-Identifier: Apache-2.0
"""Triton kernels compiled by many processes: `python -m sidechain.bench.warm [--only TEXT]`.

A kernel is compiled when it is first launched, on one core, half a second to two seconds each.
Here every case of an op, small and timed, is launched once, in several processes that use the same
Triton cache on disk, so that later runs find all kernels there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

import torch

from . import ops
from .cases import Candidate, Case, reason
from .sae import race

BACKEND = "triton"


def launches(device: str, only: str) -> Iterator[tuple[Case, Candidate]]:
    """Every case of the ops whose name holds a text, with each candidate that is Triton's."""
    for module in ops.modules(only):
        tables = [module.small(device), module.cases(device)]
        if module.OP == "topk_encode":
            tables.append(module.of_shapes(race.SHAPES[device], device))
        for case in (case for table in tables for case in table):
            for candidate in case.candidates:
                if candidate.kind == "ours" and candidate.name.split()[0] == BACKEND:
                    yield case, candidate


def share(device: str, only: str, number: int, count: int) -> dict[str, int]:
    """Launch every `count`-th case, from `number` on.

    Returns:
        "launched", and "failed": those that raised; the correctness run of the op will name them.
    """
    launched = failed = 0
    for index, (case, candidate) in enumerate(launches(device, only)):
        if index % count != number:
            continue
        try:
            with torch.inference_mode():
                candidate.call(case.make(0))
            launched += 1
        except Exception as error:
            failed += 1
            print(f"{case.name} {case.dtype} {candidate.name}: {reason(error)}", flush=True)
    return {"launched": launched, "failed": failed}


def deal(device: str, only: str, count: int) -> dict[str, int]:
    """Run all parts, each in its own process."""
    options = ["--device", device, "--only", only, "--processes", str(count)]
    command = [sys.executable, "-m", f"{__package__}.warm", *options, "--share"]
    children = [
        subprocess.Popen([*command, str(n)], stdout=subprocess.PIPE, text=True)
        for n in range(count)
    ]
    total = {"launched": 0, "failed": 0, "processes lost": 0}
    for child in children:
        lines = child.communicate()[0].splitlines()
        print("\n".join(lines[:-1][:5]), flush=True)
        if child.returncode:
            total["processes lost"] += 1
            continue
        for name, number in json.loads(lines[-1]).items():
            total[name] += number
    return total


def main(argv: Sequence[str] | None = None) -> int:
    """Run and print; 1 if nothing could be launched."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--only", default="")
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 1) - 2))
    parser.add_argument("--share", type=int)
    options = parser.parse_args(argv)
    device, only, count = options.device, options.only, options.processes
    if options.share is not None:
        print(json.dumps(share(device, only, options.share, count)))
        return 0
    start = time.monotonic()
    found = deal(device, only, count)
    print(f"{time.monotonic() - start:.0f} s in {count} processes: {json.dumps(found)}")
    return int(not found["launched"])


if __name__ == "__main__":
    sys.exit(main())
