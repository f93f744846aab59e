# SPDX-License-Identifier: Apache-2.0
"""`code_sums_` against index_add on the flattened sums of labels and features."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sidechain.ops import CodeSums, code_sums_
from sidechain.testing.cases import SUMS_BENCH, SUMS_CASES, SumsCase

from ..cases import Case
from ._build import Args, Work

OP = "code_sums_"


def eager(args: Args) -> None:
    """One index_add for each sum."""
    label, indices = args["label"], args["indices"].long()
    labels, features = args["sums"].shape
    known = (label >= 0) & (label < labels)
    used = (indices >= 0) & (args["values"] != 0) & known[:, None]
    at = torch.where(used, label[:, None] * features + indices, 0).flatten()
    values = torch.where(used, args["values"], 0.0).flatten()
    args["sums"].view(-1).index_add_(0, at, values)
    args["squares"].view(-1).index_add_(0, at, values.square())
    args["counts"].view(-1).index_add_(0, at, used.flatten().to(args["counts"].dtype))
    args["rows"].index_add_(0, torch.where(known, label, 0), known.to(args["rows"].dtype))


def _run(args: Args, backend: str) -> None:
    out = CodeSums(*(args[name] for name in CodeSums._fields))
    rest = {n: args[n] for n in ("offsets", "label")}
    code_sums_(out, args["values"], args["indices"], **rest, backend=backend)


def _outputs(args: Args, result: Any) -> dict[str, Tensor]:
    return {name: args[name] for name in CodeSums._fields}


WORK = Work(OP, _run, eager, _outputs)


def moved(case: SumsCase) -> int:
    """Codes in; the sums in and out."""
    return 8 * case.rows * case.k + 2 * 16 * case.labels * case.features


def quick_cases(table: tuple[SumsCase, ...]) -> list[SumsCase]:
    """The kinds of cases of the table at a tiny shape, each once."""
    tiny = [replace(case, rows=24, features=96, k=4, labels=5) for case in table]
    return list(dict.fromkeys(tiny))


def cases(device: str, *, quick: bool = False) -> Iterator[Case]:
    """Features of a generation, by step."""
    for case in quick_cases(SUMS_BENCH) if quick else SUMS_BENCH:
        make = partial(case.make, device=device)
        candidates = WORK.candidates(device, quick=quick)
        yield WORK.case(case.name, "f32", make, candidates, moved=moved(case))


def small(device: str) -> Iterator[Case]:
    """The op's case table."""
    for case in SUMS_CASES:
        make = partial(case.make, device=device)
        yield WORK.case(case.name, "f32", make, WORK.ours(device), moved=moved(case))
