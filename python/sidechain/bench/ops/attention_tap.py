# SPDX-License-Identifier: Apache-2.0
"""`attention_tap` against attention over gathered contexts and a pooled capture."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sidechain.ops import attention_tap
from sidechain.testing.cases import ATTENTION_BENCH, ATTENTION_CASES, DTYPES, AttentionCase

from ..cases import Case
from ._build import Args, Work

OP = "attention_tap"
BUFFERS = ("sums", "squares", "counts", "ring")


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
    args["sums"][1] += out.flatten(2).float().sum(1)
    args["counts"][1] += out.shape[1]
    return out


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
    return {"out": result} | {name: args[name] for name in BUFFERS if name in args}


WORK = Work(OP, lambda args, backend: attention_tap(**args, backend=backend), eager, _outputs)


def cases(device: str) -> Iterator[Case]:
    """Sites that are timed, in every dtype."""
    for case in ATTENTION_BENCH:
        for name, dtype in DTYPES.items():
            make = partial(case.make, dtype, device=device)
            sizes = {"moved": moved(case, dtype), "flops": flops(case)}
            yield WORK.case(case.name, name, make, WORK.candidates(device), **sizes)


def small(device: str) -> Iterator[Case]:
    """The op's case table."""
    for case in ATTENTION_CASES:
        for name, dtype in DTYPES.items():
            make = partial(case.make, dtype, device=device)
            yield WORK.case(case.name, name, make, WORK.ours(device), moved=moved(case, dtype))
