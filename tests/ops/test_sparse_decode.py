# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
import math
import shutil
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ops.harness import Harness, dtypes
from ops.support import DEVICE, upcast
from sidechain.ops import sparse_decode, sparse_decode_loss
from sidechain.testing.cases import DECODE_CASES, DTYPES, DecodeCase
from sidechain.testing.tolerance import assert_close

every_case = pytest.mark.parametrize("case", DECODE_CASES, ids=lambda c: c.name)
LEAVES = ("values", "w_dec", "b_dec")


def dense(args: dict[str, Any]) -> Tensor:
    """Codes as a matrix [N, F] in float64, entry by entry from the docstring."""
    values, indices = args["values"].double(), args["indices"]
    features = args["w_dec"].shape[0]
    if "offsets" in args:
        bounds = args["offsets"].tolist()
        lists = [range(a, b) for a, b in itertools.pairwise(bounds)]
    else:
        n, k = values.shape
        lists = [range(i * k, (i + 1) * k) for i in range(n)]
    codes = torch.zeros(len(lists), features, dtype=torch.float64)
    values, indices = values.reshape(-1), indices.reshape(-1)
    for n, places in enumerate(lists):
        for i in places:
            if 0 <= int(indices[i]) < features:
                codes[n, int(indices[i])] = values[i]
    return codes


def decode_args(args: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in args.items() if k not in ("target", "row_weight")}


def _call(args: dict[str, Any], **more: Any) -> dict[str, Tensor]:
    loss = sparse_decode_loss(**args, **more)
    return loss._asdict() | {"x_hat": sparse_decode(**decode_args(args), **more)}


DECODE = Harness("sparse_decode", _call)
every_backend = DECODE.every_backend


class TestNumerics:
    @every_backend
    @dtypes
    @every_case
    def test_against_float64(self, case: DecodeCase, dtype: torch.dtype, backend: str) -> None:
        args = case.make(dtype, device=DEVICE[backend])
        DECODE.check(args, DECODE.run(args, backend=backend))

    @every_case
    def test_reference_against_dense_product(self, case: DecodeCase) -> None:
        args = upcast(case.make(torch.float64))
        codes = dense(args)
        x_hat = codes @ args["w_dec"]
        if args["b_dec"] is not None:
            x_hat = x_hat + args["b_dec"]
        error, loss, dvalues = sparse_decode_loss(**args, backend="reference")
        close = {"rtol": 1e-10, "atol": 1e-10}
        torch.testing.assert_close(sparse_decode(**decode_args(args)), x_hat, **close)
        torch.testing.assert_close(error, x_hat - args["target"], **close)
        torch.testing.assert_close(loss, (error * error).sum(1), **close)
        # The gradient of the dense weighted loss, read at the entries.
        leaf = codes.clone().requires_grad_()
        b = 0.0 if args["b_dec"] is None else args["b_dec"]
        row = (leaf @ args["w_dec"] + b - args["target"]).square().sum(1)
        (row * args.get("row_weight", torch.ones(len(row)).double())).sum().div(2).backward()
        where = dict(args, values=dvalues)
        inside = dense(where) != 0
        assert leaf.grad is not None
        torch.testing.assert_close(dense(where)[inside], leaf.grad[inside], **close)

    @settings(max_examples=40, deadline=None)
    @given(
        rows=st.integers(0, 40),
        width=st.integers(8, 300),  # a root mean square of few numbers says little
        features=st.integers(1, 80),
        k=st.integers(0, 40),
        flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
        dtype=st.sampled_from(list(DTYPES.values())),
        seed=st.integers(0, 99),
    )
    def test_any_shape(
        self, rows: int, width: int, features: int, k: int, flags: tuple[bool, ...],
        dtype: torch.dtype, seed: int,
    ) -> None:  # fmt: skip
        case = DecodeCase(rows, width, features, min(k, features), *flags)
        args = case.make(dtype, seed)
        DECODE.check(args, DECODE.run(args))


class TestLayout:
    @every_backend
    @dtypes
    @pytest.mark.parametrize("offset", range(0, 18, 3))
    @pytest.mark.parametrize("csr", [False, True], ids=["topk", "csr"])
    def test_offset_views_and_guards(
        self, csr: bool, offset: int, dtype: torch.dtype, backend: str
    ) -> None:
        if DEVICE[backend] != "cpu":
            pytest.skip("guard bands are laid in host memory")
        args = DecodeCase(5, 23, 30, 4, csr=csr, row_weight=True).make(dtype)
        floats = [name for name, t in args.items() if t.is_floating_point()]
        DECODE.check_guarded(args, floats, offset, backend=backend)

    @every_backend
    @dtypes
    def test_strided_rows(self, dtype: torch.dtype, backend: str) -> None:
        args = DecodeCase(6, 40, 30, 5, row_weight=True).make(dtype, device=DEVICE[backend])
        for name in ("values", "indices", "w_dec", "target"):
            t = args[name]
            wide = t.new_zeros(2 * t.shape[0], t.shape[1] + 3)
            args[name] = wide[::2, 1 : 1 + t.shape[1]].copy_(t)
        DECODE.check(args, DECODE.call(args, backend=backend))

    def test_determinism_over_threads(self) -> None:
        args = DecodeCase(300, 200, 500, 16, row_weight=True).make(torch.float32)
        before, seen = torch.get_num_threads(), []
        try:
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                leaves = {k: args[k].clone().requires_grad_() for k in LEAVES}
                out = sparse_decode(**(decode_args(args) | leaves))
                grads = torch.autograd.grad(out.square().sum(), leaves.values())
                seen.append((*sparse_decode_loss(**args), out, *grads))
        finally:
            torch.set_num_threads(before)
        for other in seen[1:]:
            for a, b in zip(seen[0], other, strict=True):
                assert torch.equal(a, b)


class TestEdges:
    @every_backend
    @pytest.mark.parametrize("index", [-1, -(2**31), 8, 2**31 - 1])
    def test_index_outside_stands_for_nothing(self, index: int, backend: str) -> None:
        args = DecodeCase(3, 16, 8, 2).make(torch.float32, device=DEVICE[backend])
        args["indices"] = torch.full_like(args["indices"], index)
        args["values"] = torch.full_like(args["values"], math.nan)
        got = sparse_decode_loss(**args, backend=backend)
        assert torch.equal(got.error, args["b_dec"].expand(3, 16) - args["target"])
        assert torch.equal(got.dvalues, torch.zeros_like(got.dvalues))

    @every_backend
    def test_nan_reaches_only_its_row(self, backend: str) -> None:
        args = DecodeCase(4, 40, 30, 3).make(torch.float32, device=DEVICE[backend])
        args["values"][2, 0] = math.nan
        got = sparse_decode_loss(**args, backend=backend)
        assert got.error[2].isnan().all()
        assert got.loss.isnan().tolist() == [False, False, True, False]
        assert not got.dvalues[[0, 1, 3]].isnan().any()

    @every_backend
    def test_value_zero_has_its_derivative(self, backend: str) -> None:
        args = DecodeCase(1, 16, 8, 1).make(torch.float32, device=DEVICE[backend])
        args["values"].fill_(0.0), args["indices"].fill_(5)
        got = sparse_decode_loss(**args, backend=backend)
        expected = (args["b_dec"] - args["target"][0]) @ args["w_dec"][5]
        torch.testing.assert_close(got.dvalues[0, 0], expected, rtol=1e-5, atol=1e-5)


class TestGradients:
    @pytest.mark.parametrize("csr", [False, True], ids=["topk", "csr"])
    @pytest.mark.parametrize("backend", ["reference", "auto"])
    def test_gradcheck(self, csr: bool, backend: str) -> None:
        args = upcast(decode_args(DecodeCase(3, 4, 6, 3, csr=csr).make(torch.float64)))
        leaves = [args.pop(k).requires_grad_() for k in LEAVES]

        def call(*t: Tensor) -> Tensor:
            return sparse_decode(**args, **dict(zip(LEAVES, t, strict=True)), backend=backend)

        assert torch.autograd.gradcheck(call, leaves)

    @every_backend
    @dtypes
    @every_case
    def test_against_dense_float64(
        self, case: DecodeCase, dtype: torch.dtype, backend: str
    ) -> None:
        args = case.make(dtype, device=DEVICE[backend])
        target = args["target"].float()

        def gradients(args: dict[str, Any], backend: str) -> dict[str, Tensor]:
            args = decode_args(args)
            leaves = {k: args[k].clone().requires_grad_() for k in LEAVES if args[k] is not None}
            out = sparse_decode(**(args | leaves), backend=backend)
            # Without rows or codes the reference never meets its leaves.
            loss = (out * target).sum()
            grads = torch.autograd.grad(loss, leaves.values(), materialize_grads=True)
            return dict(zip(leaves, grads, strict=True))

        got, eager = gradients(args, backend), gradients(args, "reference")
        exact = gradients(upcast(args), "reference")
        for name in got:
            assert got[name].dtype == args[name].dtype
            assert_close(f"d {name}", got[name], exact[name], eager[name])
        # And by dense autograd, which knows nothing of entries.
        codes = dense(args).requires_grad_()
        table = args["w_dec"].double().requires_grad_()
        (codes @ table * target.double()).sum().backward()
        assert codes.grad is not None
        assert table.grad is not None
        torch.testing.assert_close(exact["w_dec"], table.grad, rtol=1e-10, atol=1e-10)
        where = dense(dict(args, values=exact["values"]))
        inside = where != 0
        torch.testing.assert_close(where[inside], codes.grad[inside], rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("name", LEAVES)
    def test_only_what_is_asked_for(self, name: str) -> None:
        args = decode_args(DECODE_CASES[0].make(torch.float32))
        args[name].requires_grad_()
        sparse_decode(**args).sum().backward()
        assert args[name].grad is not None

    def test_a_second_time_is_refused(self) -> None:
        args = decode_args(DECODE_CASES[0].make(torch.float32))
        args["values"].requires_grad_()
        args["w_dec"].requires_grad_()
        out = sparse_decode(**args).square().sum()
        (first,) = torch.autograd.grad(out, args["values"], create_graph=True)
        with pytest.raises(NotImplementedError, match="expected to be differentiated once"):
            first.sum().backward()

    @pytest.mark.parametrize("name", ["values", "w_dec", "b_dec", "target", "row_weight"])
    def test_loss_refuses(self, name: str) -> None:
        args = DecodeCase(2, 4, 6, 2, row_weight=True).make(torch.float32)
        args[name].requires_grad_()
        with pytest.raises(NotImplementedError, match="sparse_decode is differentiable"):
            sparse_decode_loss(**args)
        with torch.no_grad():
            sparse_decode_loss(**args)


class TestTorch:
    @dtypes
    @pytest.mark.parametrize("case", DECODE_CASES[:2], ids=lambda c: c.name)
    def test_opcheck(self, case: DecodeCase, dtype: torch.dtype) -> None:
        args = case.make(dtype)
        ops = torch.ops.sidechain
        codes = (args["values"], args["indices"])
        table, offsets = args["w_dec"], args.get("offsets")
        leaves = (codes[0].clone().requires_grad_(), table.clone().requires_grad_())
        bias = args["b_dec"].clone().requires_grad_()
        torch.library.opcheck(
            ops.sparse_decode.default, (leaves[0], codes[1], leaves[1], bias, offsets)
        )
        for needs in ((True, True), (True, False), (False, True)):
            torch.library.opcheck(
                ops.sparse_decode_backward.default,
                (args["target"].float(), *codes, table, offsets, *needs),
            )
        torch.library.opcheck(
            ops.sparse_decode_loss.default,
            (*codes, table, args["b_dec"], args["target"], offsets, args.get("row_weight")),
        )

    @pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
    def test_compile_fullgraph_with_gradient(self) -> None:
        args = decode_args(DECODE_CASES[0].make(torch.float32))

        def loss(values: Tensor, w_dec: Tensor) -> Tensor:
            return sparse_decode(**(args | {"values": values, "w_dec": w_dec})).square().sum()

        leaves = [args[k].clone().requires_grad_() for k in ("values", "w_dec")]
        plain = torch.autograd.grad(loss(*leaves), leaves)
        compiled = torch.compile(loss, fullgraph=True, dynamic=False)
        for a, b in zip(torch.autograd.grad(compiled(*leaves), leaves), plain, strict=True):
            torch.testing.assert_close(a, b)


BAD = [
    ({"values": [1.0]}, TypeError, "expected values to be a tensor, got list"),
    ({"values": torch.zeros(3, 2).half()}, TypeError, "values of float32, got float16"),
    ({"values": torch.zeros(6)}, ValueError, r"values of shape \[N, K\] \(fixed width"),
    ({"indices": torch.zeros(3, 2).long()}, TypeError, "indices of int32, got int64"),
    ({"indices": torch.zeros(3, 3).int()}, ValueError, r"indices of shape \[3, 2\]"),
    ({"w_dec": None}, TypeError, "expected w_dec to be a tensor, got NoneType"),
    ({"w_dec": torch.zeros(4)}, ValueError, r"w_dec of shape \[F, d\].*got \[4\]"),
    ({"w_dec": torch.zeros(8, 16).int()}, TypeError, "expected w_dec of .*, got int32"),
    ({"w_dec": torch.zeros(16, 8).mT}, ValueError, "w_dec with a contiguous last dim"),
    ({"b_dec": torch.zeros(15)}, ValueError, r"b_dec of shape \[16\] \(d of w_dec\)"),
    ({"b_dec": torch.zeros(16).half()}, TypeError, "b_dec of float32, got float16"),
    ({"target": torch.zeros(4, 16)}, ValueError, r"target of shape \[3, 16\]"),
    ({"target": torch.zeros(3, 16).int()}, TypeError, "expected target of"),
    ({"row_weight": torch.zeros(4)}, ValueError, r"row_weight of shape \[3\]"),
    ({"offsets": torch.zeros(4).long()}, ValueError, r"values of shape \[nnz\] \(CSR"),
    ({"target": torch.zeros(3, 16, device="meta")}, RuntimeError, "expected target on cpu"),
]


class TestContract:
    @pytest.mark.parametrize("backend", ["auto", "reference"])
    @pytest.mark.parametrize(("change", "error", "match"), BAD, ids=[b[2][:40] for b in BAD])
    def test_bad_calls(
        self, change: dict[str, Any], error: type[Exception], match: str, backend: str
    ) -> None:
        args = DecodeCase(3, 16, 8, 2, row_weight=True).make(torch.float32)
        with pytest.raises(error, match="^sparse_decode_loss: .*" + match):
            sparse_decode_loss(**(args | change), backend=backend)
        if not change.keys() & {"target", "row_weight"}:
            with pytest.raises(error, match="^sparse_decode: .*" + match):
                sparse_decode(**(decode_args(args) | change), backend=backend)

    @pytest.mark.parametrize(
        ("change", "error", "match"),
        [
            ({"offsets": torch.zeros(0).long()}, ValueError, r"offsets of shape \[N \+ 1\]"),
            ({"offsets": torch.zeros(3).int()}, TypeError, "offsets of int64, got int32"),
            ({"offsets": torch.zeros(2, 2).long()}, ValueError, "offsets of shape"),
            ({"target": torch.zeros(1, 16)}, ValueError, r"target of shape \[3, 16\]"),
        ],
    )
    def test_bad_csr(self, change: dict[str, Any], error: type[Exception], match: str) -> None:
        args = DecodeCase(3, 16, 8, 2, csr=True).make(torch.float32)
        with pytest.raises(error, match="^sparse_decode_loss: .*" + match):
            sparse_decode_loss(**(args | change))

    def test_unknown_and_absent_backend(self) -> None:
        DECODE.check_backends(DecodeCase(3, 16, 8, 2).make(torch.float32), absent="triton")
