# SPDX-License-Identifier: Apache-2.0
"""`attention_tap` against attention over gathered contexts and a pooled capture."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sidechain.ops import Capture, attention_tap
from sidechain.testing.cases import (
    ATTENTION_BENCH,
    ATTENTION_CASES,
    DTYPES,
    AttentionCase,
    structured,
)

from ..cases import Case
from ._build import Args, Work

OP = "attention_tap"


def _attend(args: Args, rows: Tensor) -> Tensor:
    q, k, v = args["q"], args["k_bank"][rows], args["v_bank"][rows]
    grouped = q.shape[2] != k.shape[2]
    out = scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), enable_gqa=grouped
    )
    return out.transpose(1, 2)


def eager(args: Args) -> Tensor:
    """SDPA on the keys and values of each row, the capture on its output."""
    index = args["context_index"]
    out = _attend(args, index.clamp(min=0).long())
    out = torch.where((index >= 0)[:, None, None, None], out, 0.0)
    args["capture"].sums[1] += out.flatten(2).float().sum(1)
    args["capture"].counts[1] += out.shape[1]
    return out


def hooked(args: Args) -> Tensor:
    """SDPA on contexts that are already gathered for each row, the capture in a hook."""
    out = _attend_own(args, 0)
    out = torch.where((args["context_index"] >= 0)[:, None, None, None], out, 0.0)
    args["capture"].sums[1] += out.flatten(2).float().sum(1)
    args["capture"].counts[1] += out.shape[1]
    return out


def alone(args: Args) -> Tensor:
    """SDPA on the rows that have a context, without capture: the lower bound of the time."""
    return _attend_own(args, args["idle"])


def _attend_own(args: Args, first: int) -> Tensor:
    q, k, v = (args[name][first:] for name in ("q", "k_own", "v_own"))
    grouped = q.shape[2] != k.shape[1]
    return scaled_dot_product_attention(q.transpose(1, 2), k, v, enable_gqa=grouped).transpose(1, 2)


def with_own(args: Args) -> Args:
    """Add each row's keys and values [R, H, S, D], and the number of leading rows without any."""
    index = args["context_index"]
    rows = index.clamp(min=0).long()
    own = {f"{n}_own": args[f"{n}_bank"][rows].transpose(1, 2).contiguous() for n in "kv"}
    return args | own | {"idle": int((index < 0).sum())}


def moved(case: AttentionCase, dtype: torch.dtype) -> int:
    """Queries in, output out, every context once, the sums in and out."""
    kv = case.kv_heads or case.heads
    rows = 2 * case.rows * case.tokens * case.heads * case.width * dtype.itemsize
    banks = 2 * case.contexts * case.context * kv * case.width * dtype.itemsize
    return rows + banks + 2 * 4 * (case.sums + case.squares) * case.rows * case.heads * case.width


def flops(case: AttentionCase) -> int:
    """Two products."""
    return 4 * case.rows * case.tokens * case.context * case.heads * case.width


def _outputs(args: Args, result: Tensor) -> dict[str, Tensor]:
    captured = args["capture"]._asdict() if "capture" in args else {}
    buffers = {name: captured.get(name) for name in Capture._fields[:4]}
    return {"out": result} | {name: t for name, t in buffers.items() if t is not None}


def _run(args: Args, backend: str) -> Tensor:
    given = {name: value for name, value in args.items() if name not in ("k_own", "v_own", "idle")}
    return attention_tap(**given, backend=backend)


WORK = Work(OP, _run, eager, _outputs, {"sdpa + hook": hooked}, {"sdpa alone": alone})


def quick_cases(table: tuple[AttentionCase, ...]) -> list[AttentionCase]:
    """The kinds of cases of the table at a tiny shape, each once."""
    sizes: dict[str, Any] = {"rows": 3, "tokens": 9, "context": 6, "heads": 2, "width": 8}
    return list(dict.fromkeys(replace(case, kv_heads=None, **sizes) for case in table))


def _make(case: AttentionCase, dtype: torch.dtype, device: str, seed: int) -> Args:
    return with_own(_small(case, dtype, device, seed))


def _small(case: AttentionCase, dtype: torch.dtype, device: str, seed: int) -> Args:
    return structured(case.make(dtype, seed, device))


def cases(device: str, *, quick: bool = False) -> Iterator[Case]:
    """Sites that are timed, in every dtype."""
    for case in quick_cases(ATTENTION_BENCH) if quick else ATTENTION_BENCH:
        for name, dtype in DTYPES.items():
            make = partial(_make, case, dtype, device)
            sizes = {"moved": moved(case, dtype), "flops": flops(case)}
            yield WORK.case(case.name, name, make, WORK.candidates(device, quick=quick), **sizes)


def small(device: str) -> Iterator[Case]:
    """The op's case table."""
    for case in ATTENTION_CASES:
        for name, dtype in DTYPES.items():
            make = partial(_small, case, dtype, device)
            yield WORK.case(case.name, name, make, WORK.ours(device), moved=moved(case, dtype))
