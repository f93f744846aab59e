# SPDX-License-Identifier: Apache-2.0
"""`tap_` against the hook one writes by hand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sidechain.ops import Capture, tap_
from sidechain.testing.cases import DTYPES, TAP_BENCH, TAP_CASES, TAP_LIMITS, TapCase, structured

from ..cases import ROTATED, Case
from ._build import Args, Work

OP = "tap_"
# A site of ACE-Step v1 alone: short enough that the launch shows.
SHORT = replace(TAP_BENCH[0], rows=2, tokens=323, channels=2560)


def eager(args: Args) -> None:
    """The hook one writes by hand for a known step: no device tensors, no masks, no spare work."""
    x, slot = args["x"], 1
    capture, steering = args.get("capture", Capture()), args.get("steering")
    xf = x.float()
    if capture.sums is not None:
        capture.sums[slot] += xf.sum(1)
        capture.squares[slot] += xf.square().sum(1)
        capture.counts[slot] += x.shape[1]
    if capture.ring is not None:
        capture.ring[slot].copy_(x)
    if steering is None:
        return
    v = steering.vectors[0, 2]
    along = steering.strength[:, None, None]
    if steering.removal is not None:
        along = along - steering.removal[:, None, None] * (xf @ v).clamp(min=0)[..., None]
    y = xf + along * v
    if steering.renorm:
        y *= xf.norm(dim=-1, keepdim=True) / y.norm(dim=-1, keepdim=True)
    x.copy_(y)


def moved(case: TapCase, dtype: torch.dtype) -> int:
    """Bytes the op has to move: x once in, once out if it steers, the buffers in and out."""
    steers = case.strength or case.removal
    sums = case.sums + case.squares
    ring = case.ring.itemsize if case.ring is not None else 0
    each = dtype.itemsize * (2 if steers else 1) + ring
    return case.rows * case.channels * (case.tokens * each + 2 * 4 * sums)


def _outputs(args: Args, result: Any) -> dict[str, Tensor]:
    captured = args.get("capture", Capture())._asdict()
    buffers = {name: captured[name] for name in Capture._fields[:4]}
    return {"x": args["x"]} | {name: t for name, t in buffers.items() if t is not None}


WORK = Work(OP, lambda args, backend: tap_(**args, backend=backend), eager, _outputs)


def _make(case: TapCase, dtype: torch.dtype, device: str, seed: int) -> Args:
    return structured(case.make(dtype, seed, device))


def quick_cases(table: tuple[TapCase, ...]) -> list[TapCase]:
    """The kinds of cases of the table at a tiny shape, each once."""
    tiny = [replace(case, rows=2, tokens=7, channels=24) for case in table]
    return list(dict.fromkeys(tiny))


def cases(device: str, *, quick: bool = False) -> Iterator[Case]:
    """Sites that are timed, in every dtype, on as many buffers as a model has sites and more."""
    for case in quick_cases(TAP_BENCH) if quick else (*TAP_BENCH, SHORT):
        for name, dtype in DTYPES.items():
            make = partial(_make, case, dtype, device)
            sizes = {"moved": moved(case, dtype), "rotations": 2 if quick else ROTATED}
            yield WORK.case(case.name, name, make, WORK.candidates(device, quick=quick), **sizes)


def small(device: str) -> Iterator[Case]:
    """The op's case table."""
    for case in TAP_CASES + TAP_LIMITS:
        for name, dtype in DTYPES.items():
            make = partial(_make, case, dtype, device)
            yield WORK.case(case.name, name, make, WORK.ours(device), moved=moved(case, dtype))
