# SPDX-License-Identifier: Apache-2.0
"""`topk_encode` in every precision against a linear layer and `topk`.

On a GPU the product in bfloat16 alone is the limit, and `topk` after it the best that a person has
without a kernel. Of the public selections, flashinfer's radix `top_k` has a row where the package
is there. Left out: `jax.lax.top_k` (RAFT's select_k) and CuPy's argpartition, which run on streams
of their own, and RTop-K, which exists as source only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from sidechain.ops import topk_encode_fallbacks
from sidechain.testing.cases import (
    DTYPES,
    TOPK_ENCODE_BENCH,
    TOPK_ENCODE_CASES,
    TopkEncodeCase,
    encode_case,
)

from ..cases import Candidate, Case
from ..shape import Shape
from ._build import Args, Work, buffers

OP = "topk_encode"
# Searching the best product takes a compiler half a minute: once is enough to see what it gains.
TUNED = TOPK_ENCODE_BENCH[1]
PRECISIONS = {
    "cpu": ("fp32", "int8"),
    "triton": ("fp32", "bf16", "int8"),
    "reference": ("fp32",),
}


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


def product(args: Args) -> Tensor:
    """The product in bfloat16 alone: no bias, nothing selected."""
    return linear(args["x_bf16"], args["w_bf16"])


def product_topk(args: Args) -> Any:
    """The product in bfloat16 and the k largest of each row: no bias, no relu."""
    return product(args).topk(args["k"], dim=-1, sorted=False)


def flashinfer_topk(args: Args) -> Any:
    """The same with the selection of another package."""
    from flashinfer import top_k

    values, indices = top_k(product(args), args["k"])
    return torch.return_types.topk((values, indices.long()))


def _run(args: Args, backend: str, precision: str = "fp32") -> Any:
    given = {name: value for name, value in args.items() if name not in ("w_bf16", "x_bf16")}
    return encode_case(given, precision=precision, backend=backend)


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
    indices = codes.indices.long()
    mask = torch.zeros(rows, features + 1, dtype=torch.bool, device=indices.device)
    if codes.offsets is not None:
        row = torch.arange(rows, device=indices.device)
        row = torch.repeat_interleave(row, codes.offsets.diff())
        mask[row, indices[: len(row)]] = True
    else:
        # an empty slot (-1) goes to a column that is dropped
        mask.scatter_(1, torch.where(indices < 0, features, indices), True)
    return mask[:, :features]


def _mask_of_plain(args: Args, found: Any) -> Tensor:
    rows, features = args["x"].shape[0], args["w_enc"].shape[0]
    indices, used = found.indices, found.values > 0
    mask = torch.zeros(rows, features, dtype=torch.bool, device=indices.device)
    if args["mode"] == "batch_topk":
        mask.view(-1)[indices[used]] = True
        return mask
    return mask.scatter_(1, indices, used)


def _check(candidate: Candidate, *, make: Any, wanted: Callable[[], Tensor]) -> dict[str, Any]:
    """Require the sets of float64 in float32; report the recall of other dtypes.

    A part has other sets, without bias: only its values are compared.
    """
    if candidate.kind == "part":
        _check_part(candidate.call(make(0)), make(0))
        return {}
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


def _check_part(found: Any, args: Args) -> None:
    """Compare with the same rows in float32, up to the rounding of bfloat16."""
    rows = args["x_bf16"][:4].float() @ args["w_bf16"].float().T
    if isinstance(found, Tensor):
        found, wanted = found[:4].float(), rows
    else:
        wanted = rows.gather(1, found.indices[:4])
        found = found.values[:4].float()
        if (found.amin(1) < rows.topk(found.shape[1]).values[:, -1] * 0.98 - 0.05).any():
            raise AssertionError("product + topk: expected the k largest of each row")
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)


def _others(case: TopkEncodeCase, device: str, *, compiled: bool) -> Iterator[Candidate]:
    """Other ways to do the work, or a part of it, at their best settings."""
    if compiled:
        yield Candidate("compile", torch.compile(eager, dynamic=False), "compiled")
    if case.mode != "topk":
        return
    yield Candidate("eager bf16", narrow, "bf16")
    yield Candidate("product bf16", product, "part")
    yield Candidate("product bf16 + topk", product_topk, "part")
    if device == "cuda":
        yield Candidate("product bf16 + flashinfer", flashinfer_topk, "part")
        if compiled and case == TUNED:
            tuned = torch.compile(narrow, dynamic=False, mode="max-autotune-no-cudagraphs")
            yield Candidate("compile bf16", tuned, "bf16")


def timed_case(case: TopkEncodeCase, device: str, *, compiled: bool = True) -> Case:
    """Build the case of one call.

    Args:
        case: shapes and data.
        device: "cpu" or "cuda".
        compiled: also what compilers make of the plain expressions.
    """
    make = buffers(partial(_make, case, device))
    if compiled:
        torch.compiler.reset()
    plain = [Candidate("eager", eager, "plain"), *_others(case, device, compiled=compiled)]
    backend = WORK.backends(device)[0]
    ours = [
        Candidate(f"{backend} {p}", partial(_run, backend=backend, precision=p), "ours")
        for p in PRECISIONS[backend]
    ]
    return Case(
        case.name,
        "f32",
        make,
        (*plain, *ours),
        partial(_check, make=make, wanted=cache(lambda: _exact_sets(make(0)))),
        moved=4 * (case.features * case.width + case.rows * (case.width + 2 * case.k)),
        flops=2 * case.rows * case.width * case.features,
        waits="" if case.mode == "topk" else "the host reads how long the list is",
    )


def _make(case: TopkEncodeCase, device: str, seed: int) -> Args:
    simple = case.data == "random" and case.mode == "topk" and case.guess is None
    args = _draw(case, device, seed) if simple else case.make(torch.float32, seed, device)
    return args | {"w_bf16": args["w_enc"].bfloat16(), "x_bf16": args["x"].bfloat16()}


def _draw(case: TopkEncodeCase, device: str, seed: int) -> Args:
    """Draw what `case.make` draws, on the device: a large dictionary takes seconds on a CPU."""
    g = torch.Generator(device).manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=g, device=device)

    w = normal(case.features, case.width)
    w /= w.norm(dim=-1, keepdim=True)
    args = {"x": normal(case.rows, case.width), "w_enc": w, "mode": case.mode, "k": case.k}
    if case.b_enc:
        args["b_enc"] = 0.1 * normal(case.features)
    if case.b_pre:
        args["b_pre"] = normal(case.width)
    return args


def cases(device: str, *, quick: bool = False) -> Iterator[Case]:
    """Dictionaries that trainers are timed on."""
    if quick:
        tiny: dict[str, Any] = {"rows": 16, "width": 32, "features": 512, "k": 4}
        for case in dict.fromkeys(replace(case, **tiny) for case in TOPK_ENCODE_BENCH):
            yield timed_case(case, device, compiled=False)
        return
    for case in TOPK_ENCODE_BENCH:
        yield timed_case(case, device)


def of_shapes(shapes: Iterable[Shape], device: str) -> Iterator[Case]:
    """The encoders of the dictionaries that trainers are timed on."""
    for s in shapes:
        yield timed_case(TopkEncodeCase(s.tokens, s.width, s.features, s.k), device, compiled=False)


def small(device: str) -> Iterator[Case]:
    """The op's case table in float32 precision."""
    for case in TOPK_ENCODE_CASES:
        for name, dtype in DTYPES.items():
            make = partial(case.make, dtype, device=device)
            yield WORK.case(case.name, name, make, WORK.ours(device), moved=1)
