# SPDX-License-Identifier: Apache-2.0
"""`sparse_decode_loss` against the dense product, embedding_bag, and gathered dot products."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from sidechain.ops import sparse_decode_loss
from sidechain.testing.cases import DECODE_BENCH, DECODE_CASES, DTYPES, DecodeCase

from ..cases import Case
from ._build import Args, Work

OP = "sparse_decode_loss"


def dense(args: Args) -> tuple[Tensor, ...]:
    """Codes scattered into [N, F], two dense products."""
    w, used = args["w_dec"].float(), args["indices"].clamp(min=0).long()
    codes = args["values"].new_zeros(used.shape[0], w.shape[0]).scatter_add(1, used, args["values"])
    error = codes @ w + args["b_dec"] - args["target"].float()
    dvalues = (error @ w.T).gather(1, used)
    return error, error.square().sum(1), torch.where(args["indices"] >= 0, dvalues, 0.0)


def bag(args: Args) -> tuple[Tensor, ...]:
    """embedding_bag, then the decoder rows gathered again for the gradient of the codes."""
    w, used = args["w_dec"].float(), args["indices"].clamp(min=0).long()
    decoded = embedding_bag(used, w, per_sample_weights=args["values"], mode="sum")
    error = decoded + args["b_dec"] - args["target"].float()
    dvalues = torch.einsum("nkd,nd->nk", w[used], error)
    return error, error.square().sum(1), torch.where(args["indices"] >= 0, dvalues, 0.0)


def moved(case: DecodeCase, dtype: torch.dtype) -> int:
    """The decoder rows in use once, the target in, the error out, codes and their gradient."""
    used = min(case.features, case.rows * case.k)
    rows = (used + case.rows) * case.width * dtype.itemsize + 4 * case.rows * case.width
    return rows + 3 * 4 * case.rows * case.k


def _run(args: Args, backend: str) -> Any:
    return sparse_decode_loss(**args, backend=backend)


def _outputs(args: Args, result: Any) -> dict[str, Tensor]:
    return dict(zip(("error", "loss", "dvalues"), result, strict=True))


WORK = Work(OP, _run, bag, _outputs, {"dense": dense})


def quick_cases(table: tuple[DecodeCase, ...]) -> list[DecodeCase]:
    """The kinds of cases of the table at a tiny shape, each once."""
    tiny = [replace(case, rows=24, width=32, features=96, k=4) for case in table]
    return list(dict.fromkeys(tiny))


def cases(device: str, *, quick: bool = False) -> Iterator[Case]:
    """The shapes of the training bench; the weights in float32 and bfloat16."""
    for case in quick_cases(DECODE_BENCH) if quick else DECODE_BENCH:
        for name in ("f32", "bf16"):
            make = partial(case.make, DTYPES[name], device=device)
            sizes = {"moved": moved(case, DTYPES[name])}
            yield WORK.case(case.name, name, make, WORK.candidates(device, quick=quick), **sizes)


def small(device: str) -> Iterator[Case]:
    """The op's case table."""
    for case in DECODE_CASES:
        for name, dtype in DTYPES.items():
            make = partial(case.make, dtype, device=device)
            yield WORK.case(case.name, name, make, WORK.ours(device), moved=moved(case, dtype))
