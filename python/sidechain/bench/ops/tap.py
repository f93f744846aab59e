# SPDX-License-Identifier: Apache-2.0
"""`tap_` against the hook one writes by hand."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sidechain.ops import backends, tap_
from sidechain.testing.cases import DTYPES, TAP_BENCH, TAP_CASES, TapCase
from sidechain.testing.tolerance import assert_close

from ..cases import Candidate, Case

OP = "tap_"
OUTPUTS = ("x", "sums", "squares", "counts", "ring")


def eager(args: dict[str, Any]) -> None:
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


def moved(case: TapCase, dtype: torch.dtype) -> int:
    """What the op has to move: x once in, once out if it steers, the buffers in and out."""
    kept = -(-case.tokens // case.ring_stride)
    steers = case.strength or case.removal
    sums = case.sums + case.squares
    # A ring alone needs no more than the tokens that it keeps.
    read = case.tokens if steers or sums else kept
    values = case.rows * case.channels
    ring = kept * case.ring.itemsize if case.ring is not None else 0
    written = (case.tokens * dtype.itemsize if steers else 0) + ring + 2 * 4 * sums
    return values * (read * dtype.itemsize + written)


def ours(device: str) -> list[Candidate]:
    """The backends of the op that run on a device."""
    reasons = backends()[OP]
    names = [device] if reasons[device] is None else []

    def call(args: dict[str, Any], backend: str) -> Tensor:
        return tap_(**args, backend=backend)

    return [Candidate(b, partial(call, backend=b), "ours") for b in (*names, "reference")]


def _check(
    candidate: Candidate, *, case: TapCase, dtype: torch.dtype, device: str
) -> dict[str, Any] | None:
    """Ours errs at most twice as much as the reference; the others compute the same thing.

    Inductor adds the tokens of a sum one after the other, which costs a digit.
    """
    args = case.make(dtype, device=device)
    exact = {k: v.double() if _floating(v) else v for k, v in args.items()}
    tap_(**exact, backend="reference")
    plain, got = _clone(args), _clone(args)
    tap_(**plain, backend="reference")
    candidate.call(got)
    times = 2.0 if candidate.kind == "ours" else 50.0
    for name in OUTPUTS:
        if name in args:
            assert_close(
                f"{candidate.name} {name}", got[name], exact[name], plain[name], times=times
            )
    return None


def _case(case: TapCase, name: str, device: str, candidates: list[Candidate]) -> Case:
    dtype = DTYPES[name]
    return Case(
        case.name,
        name,
        lambda seed: case.make(dtype, seed, device),
        tuple(candidates),
        partial(_check, case=case, dtype=dtype, device=device),
        moved(case, dtype),
    )


def cases(device: str) -> Iterator[Case]:
    """Sites that are timed, in every dtype."""
    for case in TAP_BENCH:
        for name in DTYPES:
            torch.compiler.reset()
            compiled = Candidate("compile", torch.compile(eager, dynamic=False), "compiled")
            yield _case(
                case, name, device, [Candidate("eager", eager, "plain"), compiled, *ours(device)]
            )


def small(device: str) -> Iterator[Case]:
    """The op's case table."""
    for case in TAP_CASES:
        for name in DTYPES:
            yield _case(case, name, device, ours(device))


def _floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _clone(args: dict[str, Any]) -> dict[str, Any]:
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in args.items()}
