# SPDX-License-Identifier: Apache-2.0
"""Bench of every op: `python bench/bench_ops.py [--threads N] [--case TEXT] [--no-save]`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import harness
from sidechain.ops import backends, tap_
from sidechain.testing.cases import DTYPES, TAP_BENCH, TapCase
from sidechain.testing.tolerance import assert_close

OUTPUTS = ("x", "sums", "squares", "counts", "ring")


def eager_tap(args: dict[str, Any]) -> None:
    """What one writes by hand for a known step: no device tensors, no masks, no spare work."""
    x, slot = args["x"], 1
    xf = x.float()
    if "sums" in args:
        args["sums"][slot] += xf.sum(1)
        args["squares"][slot] += xf.square().sum(1)
        args["counts"][slot] += x.shape[1]
    if "ring" in args:
        args["ring"][slot].copy_(x[:, :: args["ring_stride"]])
    if "vectors" not in args:
        return
    v = args["vectors"][0, 2]
    along = args["strength"][:, None, None]
    if "removal" in args:
        along = along - args["removal"][:, None, None] * (xf @ v).clamp(min=0)[..., None]
    y = xf + along * v
    if args.get("renorm"):
        y *= xf.norm(dim=-1, keepdim=True) / y.norm(dim=-1, keepdim=True)
    x.copy_(y)


def tap_providers(device: str) -> dict[str, Callable[[dict[str, Any]], object]]:
    """Provider -> call on the arguments of tap_."""
    providers: dict[str, Callable[[dict[str, Any]], object]] = {
        "eager": eager_tap,
        "compile": torch.compile(eager_tap, dynamic=False),
        "reference": lambda args: tap_(**args, backend="reference"),
    }
    if backends()["tap_"][device] is None:
        providers[device] = lambda args: tap_(**args)
    return providers


def clone(args: dict[str, Any]) -> dict[str, Any]:
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in args.items()}


def assert_correct(case: TapCase, dtype: torch.dtype, device: str) -> None:
    """Ours errs at most twice as much as the reference; the others compute the same thing.

    Inductor adds the tokens of a sum one after the other, which costs a digit.
    """
    args = case.make(dtype, device=device)
    exact = {
        k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in args.items()
    }
    tap_(**exact, backend="reference")
    eager = clone(args)
    tap_(**eager, backend="reference")
    for provider, call in tap_providers(device).items():
        got = clone(args)
        call(got)
        for name in OUTPUTS:
            if name in args:
                times = 2.0 if provider == device else 50.0
                assert_close(f"{provider} {name}", got[name], exact[name], eager[name], times=times)


def moved_bytes(case: TapCase, args: dict[str, Any]) -> int:
    """What the op has to move: x once in, once out if it steers, the buffers in and out."""
    x = args["x"].nbytes
    steers = x if case.strength or case.removal else 0
    buffers = sum(2 * args[k][1].nbytes for k in ("sums", "squares") if k in args)
    if "ring" in args:
        buffers += args["ring"][1].nbytes
        if "sums" not in args and not steers:
            x //= case.ring_stride
    return x + steers + buffers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--case", default="", help="only cases whose name holds this text")
    parser.add_argument("--no-save", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows: list[harness.Row] = []
    print(f"tap_ on {harness.machine()}, {options.threads} thread(s)", flush=True)
    for case in TAP_BENCH:
        for name, dtype in DTYPES.items():
            if options.case not in case.name:
                continue
            torch.compiler.reset()
            assert_correct(case, dtype, options.device)
            args = case.make(dtype, device=options.device)
            calls = {
                provider: partial(call, args)
                for provider, call in tap_providers(options.device).items()
            }
            with torch.inference_mode():
                more = harness.compare(case.name, name, moved_bytes(case, args), args["x"], calls)
            print(harness.table(more), flush=True)
            rows += more
    if not options.no_save and not options.case:
        path = harness.save(
            "tap_", rows, path=options.out, threads=options.threads, device=options.device
        )
        print(f"written to {path}")


if __name__ == "__main__":
    main()
