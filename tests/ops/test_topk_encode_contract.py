# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch

from ops.topk_encode_codes import BATCH, FIXED, THRESHOLD, modes
from sidechain.ops import backends, topk_encode
from sidechain.testing.cases import TopkEncodeCase, encode_case

BAD = [
    ({"x": [1.0]}, TypeError, "expected x to be a tensor, got list"),
    ({"x": torch.zeros(6)}, ValueError, r"x of shape \[N, d\], got \[6\]"),
    ({"x": torch.zeros(6, 20).int()}, TypeError, "expected x of .*, got int32"),
    ({"w_enc": torch.zeros(50, 21)}, ValueError, r"w_enc of shape \[F, 20\] .*\[50, 21\]"),
    ({"w_enc": torch.zeros(50, 20).double()}, TypeError, "w_enc of .*, got float64"),
    ({"w_enc": torch.zeros(50, 20, device="meta")}, RuntimeError, "w_enc on cpu"),
    ({"b_enc": torch.zeros(20)}, ValueError, r"b_enc of shape \[50\]"),
    ({"b_pre": torch.zeros(50)}, ValueError, r"b_pre of shape \[20\]"),
    ({"k": 0}, ValueError, "expected 1 <= k <= F=50 .*, got 0"),
    ({"k": 51}, ValueError, "expected 1 <= k <= F=50 .*, got 51"),
    ({"k": None}, TypeError, "expected k to be an int .*, got NoneType"),
    ({"k": 2.0}, TypeError, "expected k to be an int .*, got float"),
    ({"mode": "best"}, ValueError, "expected mode to be one of topk, batch_topk, threshold"),
    ({"mode": "threshold"}, ValueError, r"expected no k \[mode='threshold'\], got 4"),
    ({"threshold": 1.0}, ValueError, r"expected no threshold \[mode='topk'\], got one"),
    ({"mode": "threshold", "k": None}, TypeError, "threshold to be a number .*, got NoneType"),
    ({"mode": "threshold", "k": None, "threshold": float("nan")}, ValueError, "got nan"),
    (
        {"mode": "threshold", "k": None, "threshold": torch.zeros(1)},
        ValueError,
        r"threshold of shape \[50\] .*, got \[1\]",
    ),
    ({"precision": "fp8"}, ValueError, "precision to be one of fp32, bf16, int8, got 'fp8'"),
    ({"guess": torch.zeros(5)}, ValueError, r"guess of shape \[6\] \(1 or N=x.size\(0\)\)"),
    ({"guess": torch.zeros(6).half()}, TypeError, "guess of float32, got float16"),
    ({"guess": 1.0}, TypeError, "guess to be a tensor, got float"),
]


class TestContract:
    @pytest.mark.parametrize("backend", ["auto", "reference"])
    @pytest.mark.parametrize(("change", "error", "match"), BAD, ids=[b[2][:40] for b in BAD])
    def test_bad_calls(
        self, change: dict[str, Any], error: type[Exception], match: str, backend: str
    ) -> None:
        args = FIXED.make(torch.float32)
        with pytest.raises(error, match="^topk_encode: .*" + match):
            encode_case(args | change, backend=backend)

    @pytest.mark.parametrize("backend", ["fast", "", None])
    def test_unknown_backend(self, backend: Any) -> None:
        with pytest.raises(ValueError, match="expected backend to be one of auto, reference"):
            encode_case(FIXED.make(torch.float32), backend=backend)

    def test_absent_backend(self) -> None:
        with pytest.raises(RuntimeError, match="expected backend 'cuda' to be available, got:"):
            encode_case(FIXED.make(torch.float32), backend="cuda")

    def test_weights_are_a_struct(self) -> None:
        args = FIXED.make(torch.float32)
        with pytest.raises(TypeError, match=r"^topk_encode: expected encoder to be an Encoder"):
            topk_encode(args["x"], args["w_enc"], k=4)

    @pytest.mark.parametrize("backend", ["auto", "cpu"])
    @modes
    def test_no_bfloat16_on_a_cpu(self, case: TopkEncodeCase, backend: str) -> None:
        if backend == "cpu" and backends()["topk_encode"]["cpu"]:
            pytest.skip("topk_encode/cpu is not available")
        with pytest.raises(NotImplementedError, match=r"^topk_encode: expected precision='fp32'"):
            encode_case(case.make(torch.float32), precision="bf16", backend=backend)

    @pytest.mark.skipif(bool(backends()["topk_encode"]["cpu"]), reason="no kernel on the CPU")
    def test_kernel_refuses_bfloat16(self) -> None:
        """What a compiled graph calls past the public function."""
        x, w, ops = torch.zeros(2, 4), torch.zeros(5, 4), torch.ops.sidechain
        indices, grad = torch.zeros(2, 1, dtype=torch.int32), torch.zeros(2, 1)
        for call in (
            lambda: ops.topk_encode.default(x, w, None, None, 1, 1, None),
            lambda: ops.topk_encode_ragged.default(x, w, None, None, 1, None, 1, None),
            lambda: ops.topk_encode_backward.default(
                grad, indices, None, x, w, None, 1, True, True
            ),
        ):
            with pytest.raises(RuntimeError, match="expected precision 0"):
                call()


needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="Inductor needs a C++ compiler on the CPU"
)


class TestTorch:
    @pytest.mark.parametrize(
        ("case", "grad"), [(FIXED, False), (FIXED, True), (BATCH, True), (THRESHOLD, True)]
    )
    def test_opcheck(self, case: TopkEncodeCase, grad: bool) -> None:
        args = case.make(torch.float32)
        tensors = [args[n].requires_grad_(grad) for n in ("x", "w_enc", "b_enc", "b_pre")]
        if case.mode == "topk":
            op = torch.ops.sidechain.topk_encode.default
            torch.library.opcheck(op, (*tensors, case.k, 0, None))
        else:
            op = torch.ops.sidechain.topk_encode_ragged.default
            limit = None if case.mode == "batch_topk" else torch.tensor([1.5])
            torch.library.opcheck(op, (*tensors, case.k, limit, 0, None))

    @needs_compiler
    @pytest.mark.parametrize("backend", ["auto", "reference"])
    def test_compile_fullgraph(self, backend: str) -> None:
        args = FIXED.make(torch.float32)
        args["w_enc"].requires_grad_()
        compiled = torch.compile(
            lambda **kw: encode_case(kw, backend=backend), fullgraph=True, dynamic=False
        )
        got, want = compiled(**args), encode_case(args, backend=backend)
        assert torch.equal(got.indices, want.indices)
        torch.testing.assert_close(got.values, want.values)
        grads = [torch.autograd.grad(c.values.sum(), args["w_enc"])[0] for c in (got, want)]
        torch.testing.assert_close(*grads)
