# SPDX-License-Identifier: Apache-2.0
"""`tap_` against the hook one writes by hand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sidechain.ops import tap_
from sidechain.testing.cases import DTYPES, TAP_BENCH, TAP_CASES, TAP_LIMITS, TapCase

from ..cases import ROTATED, Case
from ._build import Args, Work

OP = "tap_"
# A site of ACE-Step v1 alone: short enough that the launch shows.
SHORT = replace(TAP_BENCH[0], rows=2, tokens=323, channels=2560)
OUTPUTS = ("x", "sums", "squares", "counts", "ring")


def eager(args: Args) -> None:
    """The hook one writes by hand for a known step: no device tensors, no masks, no spare work."""
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
    """Bytes the op has to move: x once in, once out if it steers, the buffers in and out."""
    kept = -(-case.tokens // case.ring_stride)
    steers = case.strength or case.removal
    sums = case.sums + case.squares
    # A ring alone needs no more than the tokens that it keeps.
    read = case.tokens if steers or sums else kept
    values = case.rows * case.channels
    ring = kept * case.ring.itemsize if case.ring is not None else 0
    written = (case.tokens * dtype.itemsize if steers else 0) + ring + 2 * 4 * sums
    return values * (read * dtype.itemsize + written)


def _outputs(args: Args, result: Any) -> dict[str, Tensor]:
    return {name: args[name] for name in OUTPUTS if name in args}


WORK = Work(OP, lambda args, backend: tap_(**args, backend=backend), eager, _outputs)


def quick_cases(table: tuple[TapCase, ...]) -> list[TapCase]:
    """The kinds of cases of the table at a tiny shape, each once."""
    tiny = [replace(case, rows=2, tokens=7, channels=24) for case in table]
    return list(dict.fromkeys(tiny))


def cases(device: str, *, quick: bool = False) -> Iterator[Case]:
    """Sites that are timed, in every dtype, on as many buffers as a model has sites and more."""
    for case in quick_cases(TAP_BENCH) if quick else (*TAP_BENCH, SHORT):
        for name, dtype in DTYPES.items():
            make = partial(case.make, dtype, device=device)
            sizes = {"moved": moved(case, dtype), "rotations": 2 if quick else ROTATED}
            yield WORK.case(case.name, name, make, WORK.candidates(device, quick=quick), **sizes)


def small(device: str) -> Iterator[Case]:
    """The op's case table."""
    for case in TAP_CASES + TAP_LIMITS:
        for name, dtype in DTYPES.items():
            make = partial(case.make, dtype, device=device)
            yield WORK.case(case.name, name, make, WORK.ours(device), moved=moved(case, dtype))
