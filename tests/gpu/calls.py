# SPDX-License-Identifier: Apache-2.0
"""One call of every op for the GPU tests: random arguments, the public function, the schema."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ops.harness import CAPTURES, positional
from ops.sae_update_calls import WRITTEN
from ops.sae_update_calls import square as gradient_square
from sidechain import ops
from sidechain.ops import CodeSums
from sidechain.testing.cases import (
    AttentionCase,
    DecodeCase,
    EditCase,
    SumsCase,
    TapCase,
    TopkEncodeCase,
    UpdateCase,
    edit_call,
    encode_case,
    square_args,
    structured,
    update_call,
)

ENCODERS = ("x", "w_enc", "b_enc", "b_pre")


@dataclass(frozen=True)
class Call:
    """One call of an op.

    Attributes:
        make: arguments from a seed, on a device; other seeds have the same shapes.
        run: calls the public function on a backend, may write into the arguments; returns what
            came of it.
        schemas: (op, arguments) for `torch.library.opcheck`.
        graph: whether it promises to be captured in a CUDA graph.
        traced: whether `torch.compile` takes it as a full graph without further settings.
    """

    name: str
    make: Callable[[int, str], dict[str, Any]]
    run: Callable[..., dict[str, Tensor]]
    schemas: Callable[[dict[str, Any]], list[tuple[str, tuple[Any, ...]]]]
    graph: bool = True
    traced: bool = True


def _tap(args: dict[str, Any], backend: str = "auto") -> dict[str, Tensor]:
    return {"x": ops.tap_(**structured(args), backend=backend)} | {
        n: args[n] for n in CAPTURES if n in args
    }


def _attention(args: dict[str, Any], backend: str = "auto") -> dict[str, Tensor]:
    out = ops.attention_tap(**structured(args), backend=backend)
    return {"out": out} | {n: args[n] for n in CAPTURES if n in args}


def _encode(args: dict[str, Any], backend: str = "auto") -> dict[str, Tensor]:
    found = encode_case(args, backend=backend)._asdict()
    return {name: value for name, value in found.items() if value is not None}


def _encode_schema(args: dict[str, Any]) -> list[tuple[str, tuple[Any, ...]]]:
    tensors = [args[name] for name in ENCODERS]
    x, k = args["x"], args.get("k", 0)
    if args["mode"] == "topk":
        grad = torch.randn(len(x), k, device=x.device)
        indices = torch.arange(len(x) * k, device=x.device).view(-1, k) % len(args["w_enc"])
        rest = (indices.int(), None, x, args["w_enc"], args["b_pre"], 0, True, True)
        return [("topk_encode", (*tensors, k, 0, None)), ("topk_encode_backward", (grad, *rest))]
    limit = torch.full((1,), 1.5, device=x.device) if args["mode"] == "threshold" else None
    return [("topk_encode_ragged", (*tensors, k, limit, 0, None))]


def encode_gradient(
    args: dict[str, Any], backend: str = "auto", through: Callable[[Any], Any] = lambda f: f
) -> dict[str, Tensor]:
    """Gradients of `topk_encode`, its forward pass put `through` a compiler or not."""
    leaves = [args[n].detach().requires_grad_() for n in ENCODERS]
    rest = {n: v for n, v in args.items() if n not in ENCODERS}
    forward = through(
        lambda x, *weights: (
            ops.topk_encode(x, ops.Encoder(*weights), **rest, backend=backend).values
        )
    )
    loss = forward(*leaves).square().sum()
    return dict(zip(ENCODERS, torch.autograd.grad(loss, leaves), strict=True))


def _decode(args: dict[str, Any], backend: str = "auto") -> dict[str, Tensor]:
    target, weight = args["target"], args.get("row_weight")
    rest = {n: v for n, v in args.items() if n not in ("target", "row_weight")}
    loss = ops.sparse_decode_loss(**rest, target=target, row_weight=weight, backend=backend)
    return {"x_hat": ops.sparse_decode(**rest, backend=backend)} | loss._asdict()


def _decode_schema(args: dict[str, Any]) -> list[tuple[str, tuple[Any, ...]]]:
    codes = (args["values"], args["indices"])
    table, offsets = args["w_dec"], args.get("offsets")
    weight = args.get("row_weight")
    return [
        ("sparse_decode", (*codes, table, args["b_dec"], offsets)),
        ("sparse_decode_backward", (args["target"].float(), *codes, table, offsets, True, True)),
        ("sparse_decode_loss", (*codes, table, args["b_dec"], args["target"], offsets, weight)),
    ]


def decode_gradient(
    args: dict[str, Any], backend: str = "auto", through: Callable[[Any], Any] = lambda f: f
) -> dict[str, Tensor]:
    """Gradients of `sparse_decode`, likewise."""
    names = ("values", "w_dec", "b_dec")
    values, table, bias = leaves = [args[n].detach().requires_grad_() for n in names]
    indices = args["indices"]
    forward = through(lambda v, t, b: ops.sparse_decode(v, indices, t, b, backend=backend))
    grads = torch.autograd.grad(forward(values, table, bias).square().sum(), leaves)
    return dict(zip(names, grads, strict=True))


def _update(args: dict[str, Any], backend: str = "auto") -> dict[str, Tensor]:
    total = gradient_square(args, backend)
    structs, keywords = update_call(args)
    ops.sae_update_(*structs, **keywords, backend=backend)
    return {"square": total} | {n: args[n] for n in WRITTEN if args[n] is not None}


def _update_schema(args: dict[str, Any]) -> list[tuple[str, tuple[Any, ...]]]:
    return [
        ("sae_update_", tuple(args.values())),
        ("sae_gradient_square", tuple(square_args(args))),
    ]


def _edit(args: dict[str, Any], backend: str = "auto") -> dict[str, Tensor]:
    structs, keywords = edit_call(args)
    return {"x": ops.sae_edit_(*structs, **keywords, backend=backend)}


def _sums(args: dict[str, Any], backend: str = "auto") -> dict[str, Tensor]:
    out = CodeSums(*(args[n] for n in CodeSums._fields))
    rest = {n: v for n, v in args.items() if n not in CodeSums._fields}
    return dict(ops.code_sums_(out, **rest, backend=backend)._asdict())


def _reduce(args: dict[str, Any], backend: str = "auto") -> dict[str, Tensor]:
    x, *weights = (args[n] for n in ENCODERS)
    found = ops.encode_reduce(x, ops.Encoder(*weights), k=args["k"], backend=backend)
    return dict(found._asdict())


def _none(args: dict[str, Any]) -> list[tuple[str, tuple[Any, ...]]]:
    return []


def _dtyped(case: Any, dtype: torch.dtype) -> Callable[[int, str], dict[str, Any]]:
    return lambda seed, device: case.make(dtype, seed, device)


_captures: dict[str, Any] = {"sums": True, "squares": True, "counts": True}
_TAP = TapCase(3, 130, 48, removal=True, renorm=True, index=True, steer_mask=3,
               ring=torch.float16, capture_mask=3, **_captures)  # fmt: skip
_ATTENTION = AttentionCase(3, 130, 20, 4, 16, kv_heads=2, context_mask=True,
                           ring=torch.bfloat16, capture_mask=1, **_captures)  # fmt: skip
_TOPK = TopkEncodeCase(40, 64, 600, 8)
_BATCH = TopkEncodeCase(40, 64, 600, 8, mode="batch_topk")
_LIMIT = TopkEncodeCase(40, 64, 600, 8, mode="threshold")
_DECODE = DecodeCase(33, 96, 200, 8, row_weight=True)
_UPDATE = UpdateCase(24, 48, 48, 70, 6, groups=2, extras=True, clip=True, half_state=True)
_SUMS = SumsCase(500, 60, 8, labels=4, label=True)
_EDIT = EditCase(33, 96, 150, 6, strength=33, mask=True)

CALLS = (
    *(
        Call(f"tap_-{name}", _dtyped(_TAP, dtype), _tap,
             lambda a: [("tap_", positional("tap_", a))])
        for name, dtype in (("f32", torch.float32), ("bf16", torch.bfloat16))
    ),
    *(
        Call(f"attention_tap-{name}", _dtyped(_ATTENTION, dtype), _attention,
             lambda a: [("attention_tap",
                         positional("attention_tap", a | {"out": torch.zeros_like(a["q"])}))])
        for name, dtype in (("f32", torch.float32), ("bf16", torch.bfloat16))
    ),
    Call("topk_encode", _dtyped(_TOPK, torch.float32), _encode, _encode_schema),
    Call("topk_encode-bf16", _dtyped(_TOPK, torch.bfloat16), _encode, _encode_schema),
    Call("topk_encode-gradient", _dtyped(_TOPK, torch.float32), encode_gradient, _none,
         traced=False),
    Call("batch_topk", _dtyped(_BATCH, torch.float32), _encode, _encode_schema, False, False),
    Call("threshold", _dtyped(_LIMIT, torch.float32), _encode, _encode_schema, False, False),
    Call("sparse_decode", _dtyped(_DECODE, torch.bfloat16), _decode, _decode_schema),
    Call("sparse_decode-gradient", _dtyped(_DECODE, torch.float32), decode_gradient, _none,
         traced=False),
    Call("sae_update_", _dtyped(_UPDATE, torch.bfloat16), _update, _update_schema),
    Call("sae_edit_", _dtyped(_EDIT, torch.bfloat16), _edit,
         lambda a: [("sae_edit_", tuple(a.values()))]),
    Call("code_sums_", _SUMS.make, _sums,
         lambda a: [("code_sums_", positional("code_sums_", a))]),
    Call("encode_reduce", _dtyped(_TOPK, torch.float32), _reduce, _none),
)  # fmt: skip
