# SPDX-License-Identifier: Apache-2.0
"""`sae_update_` against dense gradients, projection, fused Adam and unit norm."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

from sidechain.ops import AdamState, sae_update_
from sidechain.testing.cases import DTYPES, UPDATE_BENCH, UPDATE_CASES, UpdateCase, update_call

from ..cases import Case
from ._build import Args, Work

OP = "sae_update_"
WRITTEN = ("w_enc", "w_dec", "b_enc", *AdamState._fields)


def eager(args: Args) -> None:
    """Dense gradients from codes scattered into [N, F], then what every trainer does."""
    values, indices = args["values"][0], args["indices"][0].clamp(min=0).long()
    empty = values.new_zeros(values.shape[0], args["w_enc"].shape[0])
    codes = empty.scatter_add(1, indices, values)
    dcodes = empty.scatter_add(1, indices, torch.where(values > 0, args["dvalues"][0], 0.0))
    w_enc, w_dec, b_enc = args["w_enc"], args["w_dec"], args["b_enc"]
    x = args["x"].float()
    if args["b_pre"] is not None:
        x = x - args["b_pre"]
    g_dec = codes.T @ args["error"][0]
    along = (g_dec * w_dec).sum(1, keepdim=True) / w_dec.square().sum(1, keepdim=True)
    _adam(args, [dcodes.T @ x, g_dec - along * w_dec, dcodes.sum(0)], [w_enc, w_dec, b_enc])
    w_dec.div_(w_dec.norm(dim=1, keepdim=True))


def gathered(args: Args) -> None:
    """Gradients by index_add of one row per code, as sparse trainers do."""
    values, indices = args["values"][0], args["indices"][0]
    used = (indices >= 0) & (values > 0)
    rows = torch.arange(values.shape[0], device=values.device)[:, None].expand_as(indices)[used]
    target = indices[used].long()
    x = args["x"].float() - args["b_pre"]
    w_enc, w_dec, b_enc = args["w_enc"], args["w_dec"], args["b_enc"]
    v, dv = values[used][:, None], args["dvalues"][0][used][:, None]
    g_enc = torch.zeros_like(w_enc).index_add_(0, target, dv * x[rows])
    g_dec = torch.zeros_like(w_dec).index_add_(0, target, v * args["error"][0][rows])
    g_bias = torch.zeros_like(b_enc).index_add_(0, target, dv[:, 0])
    along = (g_dec * w_dec).sum(1, keepdim=True) / w_dec.square().sum(1, keepdim=True)
    _adam(args, [g_enc, g_dec - along * w_dec, g_bias], [w_enc, w_dec, b_enc])
    w_dec.div_(w_dec.norm(dim=1, keepdim=True))


def _adam(args: Args, grads: list[Tensor], weights: list[Tensor]) -> None:
    names = ("enc", "dec", "bias")
    adam(
        weights,
        grads,
        [args[f"{name}_mean"] for name in names],
        [args[f"{name}_square"] for name in names],
        [],
        [(args["step"] - 1).float().reshape(()) for _ in names],
        fused=True,
        amsgrad=False,
        beta1=args["beta1"],
        beta2=args["beta2"],
        lr=1e-3,
        weight_decay=0.0,
        eps=args["eps"],
        maximize=False,
    )


def _run(args: Args, backend: str) -> None:
    structs, keywords = update_call(args)
    sae_update_(*structs, **keywords, backend=backend)


def _outputs(args: Args, result: Any) -> dict[str, Tensor]:
    return {name: args[name] for name in WRITTEN if args[name] is not None}


WORK = Work(OP, _run, eager, _outputs, {"index_add": gathered})


def moved(case: UpdateCase) -> int:
    """Both matrices and their Adam state in and out; rows of x and error once."""
    widths = case.d_in + case.d_out
    size = 2 if case.half_state else 4
    return 2 * case.features * widths * (4 + 2 * size) + 4 * case.rows * widths


def quick_cases(table: tuple[UpdateCase, ...]) -> list[UpdateCase]:
    """The kinds of cases of the table at a tiny shape, each once."""
    tiny = [replace(case, rows=24, d_in=32, d_out=32, features=96, k=4) for case in table]
    return list(dict.fromkeys(tiny))


def cases(device: str, *, quick: bool = False) -> Iterator[Case]:
    """The shapes of the training bench. Only ours has a bfloat16 Adam state."""
    for case in quick_cases(UPDATE_BENCH) if quick else UPDATE_BENCH:
        make = partial(case.make, torch.float32, device=device)
        candidates = WORK.candidates(device, quick=quick)
        if case.half_state:
            candidates = WORK.ours(device)[:1]
            if candidates[0].name == "reference":
                continue
        yield WORK.case(case.name, "f32", make, candidates, moved=moved(case))


def small(device: str) -> Iterator[Case]:
    """The op's case table."""
    for case in UPDATE_CASES:
        for name, dtype in DTYPES.items():
            make = partial(case.make, dtype, device=device)
            yield WORK.case(case.name, name, make, WORK.ours(device), moved=moved(case))
