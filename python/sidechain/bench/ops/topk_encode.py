# SPDX-License-Identifier: Apache-2.0
"""`topk_encode` in every precision against a linear layer and `topk`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from sidechain.ops import topk_encode, topk_encode_fallbacks
from sidechain.testing.cases import DTYPES, TOPK_ENCODE_BENCH, TOPK_ENCODE_CASES, TopkEncodeCase

from ..cases import Candidate, Case
from ._build import Args, Work

OP = "topk_encode"
PRECISIONS = ("fp32", "bf16", "int8")


def eager(args: Args) -> Any:
    """All pre-activations, then the k largest of a row or of the batch."""
    z = linear(args["x"] - args["b_pre"].to(args["x"].dtype), args["w_enc"], None)
    z = (z + args["b_enc"].to(z.dtype)).relu()
    if args["mode"] == "batch_topk":
        return z.flatten().topk(args["k"] * z.shape[0], sorted=False)
    return z.topk(args["k"], dim=-1)


def narrow(args: Args) -> Any:
    """The product in bfloat16, with the cast of the weights left out as a trainer would."""
    z = linear((args["x"] - args["b_pre"]).bfloat16(), args["w_bf16"], None)
    z = (z.float() + args["b_enc"]).relu()
    return z.topk(args["k"], dim=-1)


def _run(args: Args, backend: str, precision: str = "fp32") -> Any:
    given = {name: value for name, value in args.items() if name != "w_bf16"}
    return topk_encode(**given, precision=precision, backend=backend)


def _outputs(args: Args, codes: Any) -> dict[str, Tensor]:
    found = {"values": codes.values, "indices": codes.indices}
    return found if codes.offsets is None else found | {"offsets": codes.offsets}


WORK = Work(OP, _run, eager, _outputs, narrow=("guess",))


def _exact_sets(args: Args) -> Tensor:
    """[N, F] bool: the features that are kept, by the pre-activations in float64."""
    wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in args.items()}
    codes = _run(wide, "reference")
    return _as_mask(codes, args["x"].shape[0], args["w_enc"].shape[0])


def _as_mask(codes: Any, rows: int, features: int) -> Tensor:
    mask = torch.zeros(rows, features + 1, dtype=torch.bool)
    indices = codes.indices.long().cpu()
    if codes.offsets is not None:
        row = torch.repeat_interleave(torch.arange(rows), codes.offsets.cpu().diff())
        mask[row, indices[: len(row)]] = True
    else:
        # -1, an empty slot, goes to a column that is cut off
        mask.scatter_(1, torch.where(indices < 0, features, indices), True)
    return mask[:, :features]


def _mask_of_plain(args: Args, found: Any) -> Tensor:
    rows, features = args["x"].shape[0], args["w_enc"].shape[0]
    mask = torch.zeros(rows, features, dtype=torch.bool)
    indices, used = found.indices.cpu(), found.values.cpu() > 0
    if args["mode"] == "batch_topk":
        mask.view(-1)[indices[used]] = True
        return mask
    return mask.scatter_(1, indices, used)


def _check(candidate: Candidate, *, make: Any, wanted: Callable[[], Tensor]) -> dict[str, Any]:
    """Sets in float32 must be those of float64; of others the share found is reported."""
    args, precision = make(0), candidate.name.split()[-1]
    exact = wanted()
    before = topk_encode_fallbacks()
    found = candidate.call(args)
    ours = candidate.kind == "ours"
    got = _as_mask(found, *exact.shape) if ours else _mask_of_plain(args, found)
    recall = float((got & exact).sum() / exact.sum().clamp(min=1))
    same = float((got == exact).all(1).double().mean()) if len(exact) else 1.0
    if ours and precision == "fp32" and same < 1.0:
        raise AssertionError(f"{candidate.name}: expected the sets of float64, recall {recall}")
    if recall < 0.9:
        raise AssertionError(f"{candidate.name}: expected the k largest, recall {recall}")
    fallbacks = topk_encode_fallbacks() - before
    return {"recall": round(recall, 5), "equal sets": round(same, 4), "in full": fallbacks}


def timed_case(case: TopkEncodeCase, device: str, *, others: bool = True) -> Case:
    """What is measured of one call.

    Args:
        case: shapes and data.
        device: "cpu" or "cuda".
        others: also the compiled and the narrow plain expression.
    """
    make = partial(_make, case, device)
    torch.compiler.reset()
    plain = [Candidate("eager", eager, "plain")]
    if others:
        plain.append(Candidate("compile", torch.compile(eager, dynamic=False), "compiled"))
    if others and case.mode == "topk":
        plain.append(Candidate("eager bf16", narrow, "bf16"))
    backend = WORK.backends(device)[0]
    ours = [
        Candidate(f"{backend} {p}", partial(_run, backend=backend, precision=p), "ours")
        for p in (PRECISIONS if backend != "reference" else ("fp32",))
    ]
    return Case(
        case.name,
        "f32",
        make,
        (*plain, *ours),
        partial(_check, make=make, wanted=cache(lambda: _exact_sets(make(0)))),
        moved=4 * (case.features * case.width + case.rows * (case.width + 2 * case.k)),
        flops=2 * case.rows * case.width * case.features,
    )


def _make(case: TopkEncodeCase, device: str, seed: int) -> Args:
    args = case.make(torch.float32, seed, device)
    return args | {"w_bf16": args["w_enc"].bfloat16()}


def cases(device: str) -> Iterator[Case]:
    """Dictionaries that trainers are timed on."""
    for case in TOPK_ENCODE_BENCH:
        yield timed_case(case, device)


def small(device: str) -> Iterator[Case]:
    """The op's case table in float32 precision."""
    for case in TOPK_ENCODE_CASES:
        for name, dtype in DTYPES.items():
            make = partial(case.make, dtype, device=device)
            yield WORK.case(case.name, name, make, WORK.ours(device), moved=1)
