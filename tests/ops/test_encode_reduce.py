# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ops.harness import Harness
from ops.support import DEVICE, upcast
from sidechain.ops import CodeSums, Encoder, code_sums_, encode_reduce
from sidechain.testing.cases import SUMS_CASES, SumsCase

every_case = pytest.mark.parametrize("case", SUMS_CASES, ids=lambda c: c.name)
OUTPUTS = CodeSums._fields


def _call(args: dict[str, Any], **more: Any) -> dict[str, Tensor]:
    out = CodeSums(*(args[k] for k in OUTPUTS))
    assert code_sums_(out, **{k: v for k, v in args.items() if k not in OUTPUTS}, **more) is out
    return out._asdict()


SUMS = Harness("code_sums_", _call)


def plain(args: dict[str, Any]) -> dict[str, Tensor]:
    """Entry by entry, from the docstring."""
    out = {k: args[k].clone() for k in OUTPUTS}
    labels, features = out["sums"].shape
    values, indices = args["values"].reshape(-1), args["indices"].reshape(-1)
    if args["offsets"] is None:
        n, k = args["values"].shape
        starts = [i * k for i in range(n + 1)]
    else:
        starts = args["offsets"].tolist()
    for row in range(len(starts) - 1):
        g = 0 if args["label"] is None else int(args["label"][row])
        if not 0 <= g < labels:
            continue
        out["rows"][g] += 1
        for place in range(starts[row], starts[row + 1]):
            f, v = int(indices[place]), values[place]
            if 0 <= f < features and v != 0:
                out["sums"][g, f] += v
                out["squares"][g, f] += v * v
                out["counts"][g, f] += 1
    return out


class TestNumerics:
    @SUMS.every_backend
    @every_case
    def test_against_float64(self, case: SumsCase, backend: str) -> None:
        args = case.make(device=DEVICE[backend])
        SUMS.check(args, SUMS.run(args, backend=backend))

    @every_case
    def test_reference_against_plain(self, case: SumsCase) -> None:
        args = upcast(case.make())
        got = SUMS.run(args, backend="reference")
        for name, value in plain(args).items():
            torch.testing.assert_close(got[name], value, rtol=1e-12, atol=1e-12)

    @settings(max_examples=30, deadline=None)
    @given(
        rows=st.integers(0, 60),
        features=st.integers(1, 50),
        k=st.integers(0, 20),
        labels=st.integers(1, 5),
        flags=st.tuples(st.booleans(), st.booleans()),
        seed=st.integers(0, 99),
    )
    def test_any_shape(
        self, rows: int, features: int, k: int, labels: int, flags: tuple[bool, bool], seed: int
    ) -> None:
        case = SumsCase(rows, features, min(k, features), labels, *flags)
        args = case.make(seed)
        SUMS.check(args, SUMS.run(args))

    @SUMS.every_backend
    def test_moments_of_a_dense_matrix(self, backend: str) -> None:
        """Means and second moments by label, accumulated over two calls."""
        args = SumsCase(50, 20, 6, labels=3, label=True).make(device=DEVICE[backend])
        out = CodeSums.zeros(3, 20, DEVICE[backend])
        dense = torch.zeros(50, 21).scatter(1, args["indices"].cpu().long() % 21,
                                            args["values"].cpu())[:, :20]  # fmt: skip
        for part in (slice(0, 17), slice(17, 50)):
            code_sums_(
                out, args["values"][part], args["indices"][part], label=args["label"][part],
                backend=backend,
            )  # fmt: skip
        for g in range(3):
            rows = dense[args["label"].cpu() == g]
            assert out.rows[g] == len(rows)
            torch.testing.assert_close(out.sums[g].cpu(), rows.sum(0))
            torch.testing.assert_close(out.squares[g].cpu(), rows.square().sum(0))
            assert torch.equal(out.counts[g].cpu(), (rows != 0).sum(0))

    def test_determinism_over_threads(self) -> None:
        args = SumsCase(2000, 300, 16, labels=3, label=True).make()
        SUMS.check_threads(args)


class TestEncode:
    """`encode_reduce` against the dense encoder."""

    def problem(self, dtype: torch.dtype) -> tuple[Tensor, Encoder]:
        g = torch.Generator().manual_seed(0)
        shapes = ((60, 24), (50, 24), (50,), (24,))
        x, *weights = (torch.randn(s, generator=g).to(dtype) for s in shapes)
        return x, Encoder(*weights)

    @pytest.mark.parametrize("form", [{"k": 5}, {"threshold": 0.0}, {"threshold": 3.0}],
                             ids=["topk", "relu", "threshold"])  # fmt: skip
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
    def test_against_dense(self, form: dict[str, Any], dtype: torch.dtype) -> None:
        x, encoder = self.problem(dtype)
        label = torch.arange(60) % 4 - 1
        z = torch.relu((x - encoder.b_pre) @ encoder.w_enc.mT + encoder.b_enc)
        if "k" in form:
            z = torch.where(z >= z.sort(1).values[:, -5:-4], z, 0.0)
        else:
            z = torch.where(z > form["threshold"], z, 0.0)
        sums = CodeSums.zeros(3, 50, dtype=dtype)
        got = encode_reduce(x, encoder, **form, label=label, out=sums)
        assert got is sums
        assert got.rows.tolist() == [15, 15, 15]
        for g in range(3):
            rows = z[label == g]
            torch.testing.assert_close(got.sums[g], rows.sum(0))
            torch.testing.assert_close(got.squares[g], rows.square().sum(0))
            assert torch.equal(got.counts[g], (rows > 0).sum(0))

    def test_calls_add_up(self) -> None:
        x, encoder = self.problem(torch.float32)
        whole = encode_reduce(x, encoder, k=5)
        out = None
        for rows in (slice(0, 20), slice(20, 60)):
            more = encode_reduce(x[rows], encoder, k=5, out=out)
            assert out is None or more is out
            out = more
        assert out is not None
        for a, b in zip(out, whole, strict=True):
            torch.testing.assert_close(a, b)

    @pytest.mark.parametrize(("form", "match"), [
        ({}, "expected either k or threshold, got neither"),
        ({"k": 3, "threshold": 0.0}, "expected either k or threshold, got both"),
        ({"k": 3, "label": torch.zeros(60).long()}, r"expected out beside label .*, got None"),
    ])  # fmt: skip
    def test_bad_calls(self, form: dict[str, Any], match: str) -> None:
        with pytest.raises(ValueError, match=f"^encode_reduce: {match}"):
            encode_reduce(*self.problem(torch.float32), **form)


class TestTorch:
    @pytest.mark.parametrize("case", SUMS_CASES[:3], ids=lambda c: c.name)
    def test_opcheck(self, case: SumsCase) -> None:
        SUMS.opcheck(case.make())

    def test_gradient_does_not_flow(self) -> None:
        args = SUMS_CASES[0].make()
        args["values"].requires_grad_()
        out = CodeSums.zeros(1, 60)
        code_sums_(out, args["values"], args["indices"])
        assert not out.sums.requires_grad


BAD = [
    ({"values": 1.0}, TypeError, "expected values to be a tensor, got float"),
    ({"values": torch.zeros(40, 8).half()}, TypeError, "values of float32, got float16"),
    ({"indices": torch.zeros(40, 8).long()}, TypeError, "indices of int32, got int64"),
    ({"offsets": torch.zeros(41).long()}, ValueError, r"values of shape \[nnz\]"),
    ({"label": torch.zeros(39).long()}, ValueError, r"label of shape \[40\] \(N of the codes\)"),
    ({"label": torch.zeros(40).int()}, TypeError, "label of int64, got int32"),
    ({"sums": torch.zeros(60)}, ValueError, r"out.sums of shape \[G, F\]"),
    ({"squares": torch.zeros(4, 59)}, ValueError, r"out.squares of shape \[4, 60\]"),
    ({"counts": torch.zeros(4, 60)}, TypeError, "out.counts of int64, got float32"),
    ({"rows": torch.zeros(5).long()}, ValueError, r"out.rows of shape \[4\]"),
    ({"squares": torch.zeros(8, 60)[::2]}, ValueError, "expected out.squares to be contiguous"),
]


class TestContract:
    @pytest.mark.parametrize("backend", ["auto", "reference"])
    @pytest.mark.parametrize(("change", "error", "match"), BAD, ids=[b[2][:40] for b in BAD])
    def test_bad_calls(
        self, change: dict[str, Any], error: type[Exception], match: str, backend: str
    ) -> None:
        SUMS.check_refused(SUMS_CASES[1].make(), change, error, match, backend=backend)

    def test_out_of_another_type(self) -> None:
        args = SUMS_CASES[0].make()
        with pytest.raises(TypeError, match="expected out to be CodeSums, got tuple"):
            code_sums_((), args["values"], args["indices"])  # type: ignore[arg-type]
