# SPDX-License-Identifier: Apache-2.0
"""`sae_edit_` against decoding before and after."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from sidechain.ops import sae_edit_
from sidechain.testing.cases import DTYPES, EDIT_BENCH, EDIT_CASES, EditCase, edit_call

from ..cases import Case
from ._build import Args, Work

OP = "sae_edit_"


def eager(args: Args) -> None:
    """The change decoded by one embedding_bag and added."""
    change = args["values_new"] - args["values_old"]
    change = torch.where(args["indices"] >= 0, change, 0.0)
    if args["strength"] is not None:
        change = change * args["strength"][:, None]
    used = args["indices"].clamp(min=0).long()
    weights = change.to(args["w_dec"].dtype)
    args["x"] += embedding_bag(used, args["w_dec"], per_sample_weights=weights, mode="sum")


def dense(args: Args) -> None:
    """Both codes scattered into [N, F], a dense product, as hooks in the field do."""
    rows, features = args["x"].shape[0], args["w_dec"].shape[0]
    used = args["indices"].clamp(min=0).long()
    change = torch.where(args["indices"] >= 0, args["values_new"] - args["values_old"], 0.0)
    if args["strength"] is not None:
        change = change * args["strength"][:, None]
    codes = change.new_zeros(rows, features).scatter_add(1, used, change)
    args["x"] += (codes.to(args["w_dec"].dtype) @ args["w_dec"]).to(args["x"].dtype)


def _run(args: Args, backend: str) -> None:
    structs, keywords = edit_call(args)
    sae_edit_(*structs, **keywords, backend=backend)


def _outputs(args: Args, result: Any) -> dict[str, Tensor]:
    return {"x": args["x"]}


WORK = Work(OP, _run, eager, _outputs, {"dense": dense})


def moved(case: EditCase, dtype: torch.dtype) -> int:
    """X in and out, the decoder rows in use once, the codes."""
    used = min(case.features, case.rows * case.k)
    return (2 * case.rows + used) * case.width * dtype.itemsize + 12 * case.rows * case.k


def quick_cases(table: tuple[EditCase, ...]) -> list[EditCase]:
    """The kinds of cases of the table at a tiny shape, each once."""
    tiny = [replace(case, rows=24, width=32, features=96, k=4) for case in table]
    return list(dict.fromkeys(replace(c, strength=c.rows if c.strength else None) for c in tiny))


def cases(device: str, *, quick: bool = False) -> Iterator[Case]:
    """A batch of Stable Audio's tokens, few and many features."""
    for case in quick_cases(EDIT_BENCH) if quick else EDIT_BENCH:
        for name in ("f32", "bf16"):
            make = partial(case.make, DTYPES[name], device=device)
            sizes = {"moved": moved(case, DTYPES[name])}
            yield WORK.case(case.name, name, make, WORK.candidates(device, quick=quick), **sizes)


def small(device: str) -> Iterator[Case]:
    """The op's case table."""
    for case in EDIT_CASES:
        for name, dtype in DTYPES.items():
            make = partial(case.make, dtype, device=device)
            yield WORK.case(case.name, name, make, WORK.ours(device), moved=moved(case, dtype))
