# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ops.support import DEVICE, backend_params, clone, guarded, guards_intact, upcast
from sidechain.ops import Codes, backends, topk_encode, topk_encode_fallbacks
from sidechain.testing.cases import DTYPES, TOPK_ENCODE_CASES, TopkEncodeCase
from sidechain.testing.tolerance import assert_close

BACKENDS = backend_params("topk_encode")
KERNELS = [p for p in BACKENDS if p.values != ("reference",)]
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_kernel = pytest.mark.parametrize("backend", KERNELS)
precisions = pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
exact_precisions = pytest.mark.parametrize("precision", ["fp32", "bf16"])
FIXED = TopkEncodeCase(6, 20, 50, 4)
BATCH = TopkEncodeCase(6, 20, 50, 4, mode="batch_topk")
THRESHOLD = TopkEncodeCase(6, 20, 50, 4, mode="threshold")
modes = pytest.mark.parametrize("case", [FIXED, BATCH, THRESHOLD], ids=lambda c: c.mode)


def dense(args: dict[str, Any], precision: str, dtype: torch.dtype = torch.float64) -> Tensor:
    """z [N, F] float32 as the docstring defines it: summed in `dtype`, rounded once."""
    x, w = args["x"].float(), args["w_enc"].float()
    if "b_pre" in args:
        x = x - args["b_pre"].float()
    if precision == "bf16":
        x, w = x.bfloat16(), w.bfloat16()
    z = x.to(dtype) @ w.to(dtype).T
    if "b_enc" in args:
        z = z + args["b_enc"].to(dtype)
    return z.float().relu()


def plain(args: dict[str, Any], z: Tensor) -> Codes:
    """The codes of z, row by row with Python's sort."""
    rows, features = z.shape
    table = z.tolist()
    mode, k = args["mode"], args.get("k", 0)
    if mode == "topk":
        values, indices = torch.zeros(rows, k), torch.full((rows, k), -1, dtype=torch.int32)
        for n, row in enumerate(table):
            best = sorted(range(features), key=lambda f, row=row: (-row[f], f))[:k]
            for j, f in enumerate(f for f in best if row[f] > 0):
                values[n, j], indices[n, j] = row[f], f
        return Codes(values, indices, None)
    positions = [(n, f) for n in range(rows) for f in range(features) if table[n][f] > 0]
    if mode == "batch_topk":
        positions = sorted(positions, key=lambda p: (-table[p[0]][p[1]], p))[: rows * k]
    else:
        limit = args["threshold"]
        limit = limit.tolist() if isinstance(limit, Tensor) else [limit] * features
        positions = [p for p in positions if table[p[0]][p[1]] > limit[p[1]]]
    positions.sort()
    offsets = torch.tensor([sum(p[0] < n for p in positions) for n in range(rows + 1)])
    return Codes(
        torch.tensor([table[n][f] for n, f in positions]),
        torch.tensor([f for _, f in positions], dtype=torch.int32),
        offsets,
    )


def assert_same_codes(got: Codes, want: Codes) -> None:
    """Same set in the same order; values equal to the last bit but one."""
    got, want = (Codes(*(t if t is None else t.cpu() for t in codes)) for codes in (got, want))
    assert (got.offsets is None) == (want.offsets is None)
    if got.offsets is not None and want.offsets is not None:
        assert torch.equal(got.offsets, want.offsets)
    assert torch.equal(got.indices, want.indices)
    torch.testing.assert_close(got.values, want.values, rtol=1.3e-7, atol=1e-12, equal_nan=True)


def widened(args: dict[str, Any]) -> dict[str, Any]:
    """The problem that float32 arguments define, in float64: b_pre is subtracted in float32."""
    more = args | {"x": args["x"].float() - args["b_pre"].float()} if "b_pre" in args else args
    return upcast({k: v for k, v in more.items() if k != "guess" and k != "b_pre"})


def plain_nan(args: dict[str, Any]) -> Codes:
    """The codes of a fixed form in which rows of NaN keep their first features."""
    z = dense(args, "fp32")
    bad = z.isnan().any(-1).cpu()
    codes = plain(args, z.nan_to_num(0.0))
    k = args["k"]
    codes.values[bad], codes.indices[bad] = torch.nan, torch.arange(k, dtype=torch.int32)
    return codes


class TestNumerics:
    @every_backend
    @dtypes
    @exact_precisions
    @pytest.mark.parametrize(
        "case", [c for c in TOPK_ENCODE_CASES if c.mode != "threshold"], ids=lambda c: c.name
    )
    def test_values(
        self, case: TopkEncodeCase, precision: str, dtype: torch.dtype, backend: str
    ) -> None:
        """The sorted values, which near ties do not change, under the tolerance of all ops."""
        args = case.make(dtype, device=DEVICE[backend])
        got = topk_encode(**args, precision=precision, backend=backend)
        z, eager = dense(args, precision), dense(args, precision, torch.float32)
        if case.mode == "topk":
            want, other = (t.sort(descending=True).values[:, : case.k] for t in (z, eager))
            have = got.values
        else:
            total = min(case.rows * case.k, int((z > 0).sum()))
            want, other = (t.flatten().sort(descending=True).values[:total] for t in (z, eager))
            have = got.values.sort(descending=True).values
        assert have.dtype == torch.float32
        assert got.indices.dtype == torch.int32
        assert_close("values", have, want.double(), other)

    @pytest.mark.parametrize("case", TOPK_ENCODE_CASES, ids=lambda c: c.name)
    def test_reference_against_plain(self, case: TopkEncodeCase) -> None:
        args = widened(case.make(torch.float32))
        want = plain(args, dense(args, "fp32"))
        got = topk_encode(**args, backend="reference")
        assert got.values.dtype == torch.float64
        assert_same_codes(Codes(got.values.float(), *got[1:]), want)

    @every_kernel
    @dtypes
    @exact_precisions
    @pytest.mark.parametrize("case", TOPK_ENCODE_CASES, ids=lambda c: c.name)
    def test_exact_set(
        self, case: TopkEncodeCase, precision: str, dtype: torch.dtype, backend: str
    ) -> None:
        """The set, the order and the values of the float64 problem, whatever guess is given."""
        args = case.make(dtype, device=DEVICE[backend])
        want = plain(args, dense(args, precision))
        assert_same_codes(topk_encode(**args, precision=precision, backend=backend), want)

    @settings(max_examples=60, deadline=None)
    @given(
        rows=st.integers(0, 90),
        width=st.integers(1, 70),
        features=st.integers(1, 150),
        k=st.integers(1, 150),
        mode=st.sampled_from(["topk", "batch_topk", "threshold"]),
        data=st.sampled_from(["random", "planted", "ties", "outliers", "negative"]),
        flags=st.tuples(st.booleans(), st.booleans()),
        guess=st.integers(0, 2),
        precision=st.sampled_from(["fp32", "bf16"]),
        seed=st.integers(0, 99),
    )
    def test_any_combination(
        self,
        rows: int,
        width: int,
        features: int,
        k: int,
        mode: str,
        data: str,
        flags: tuple[bool, bool],
        guess: int,
        precision: str,
        seed: int,
    ) -> None:
        if backends()["topk_encode"]["cpu"]:
            pytest.skip("topk_encode/cpu is not available")
        case = TopkEncodeCase(
            rows, width, features, min(k, features), mode=mode, data=data,
            threshold=("number", "tensor")[flags[0]], b_enc=flags[0], b_pre=flags[1],
            guess=(None, 1, max(rows, 1))[guess] if rows else None,
        )  # fmt: skip
        args = case.make(torch.float32, seed)
        want = plain(args, dense(args, precision))
        assert_same_codes(topk_encode(**args, precision=precision), want)

    @every_kernel
    @pytest.mark.parametrize("data", ["random", "planted", "outliers"])
    def test_screen_decides_and_int8_recalls(self, data: str, backend: str) -> None:
        """The certificate holds without falling back; 8 bits alone miss next to nothing."""
        case = TopkEncodeCase(256, 256, 4096, 16, data=data)
        args = case.make(torch.float32, device=DEVICE[backend])
        topk_encode_fallbacks(reset=True)
        exact = topk_encode(**args, backend=backend)
        assert topk_encode_fallbacks() == 0
        near = topk_encode(**args, precision="int8", backend=backend)
        found = (near.indices[:, :, None] == exact.indices[:, None]).any(-1)
        assert found.float().mean() > 0.995
        z = dense(args, "fp32")
        picked = z.gather(1, near.indices.long())
        torch.testing.assert_close(near.values, picked, rtol=1.3e-7, atol=1e-12)

    @every_kernel
    def test_threshold_of_int8_keeps_no_stranger(self, backend: str) -> None:
        case = TopkEncodeCase(64, 128, 512, 1, mode="threshold")
        args = case.make(torch.float32, device=DEVICE[backend])
        exact = topk_encode(**args, backend=backend)
        near = topk_encode(**args, precision="int8", backend=backend)
        assert exact.offsets is not None
        assert near.offsets is not None
        sets = [
            {(n, int(f)) for n in range(64) for f in c.indices[c.offsets[n] : c.offsets[n + 1]]}
            for c in (exact, near)
        ]
        assert sets[1] <= sets[0]
        assert len(sets[1]) > 0.99 * len(sets[0])


class TestLayout:
    @every_kernel
    @dtypes
    @modes
    @pytest.mark.parametrize("offset", [0, 1, 3, 7, 17])
    def test_offset_views_and_guards(
        self, offset: int, case: TopkEncodeCase, dtype: torch.dtype, backend: str
    ) -> None:
        if DEVICE[backend] != "cpu":
            pytest.skip("guard bands are laid in host memory")
        args = case.make(dtype)
        moved, wholes = clone(args), {}
        for name in ("x", "w_enc", "b_enc", "b_pre"):
            moved[name], wholes[name] = guarded(args[name], offset)
        want = topk_encode(**args, backend=backend)
        assert_same_codes(topk_encode(**moved, backend=backend), want)
        for name, whole in wholes.items():
            assert guards_intact(whole, moved[name], offset), name

    @every_kernel
    @modes
    def test_any_strides(self, case: TopkEncodeCase, backend: str) -> None:
        args = case.make(torch.float32, device=DEVICE[backend])
        want = topk_encode(**args, backend=backend)
        strided = args | {
            "x": args["x"].repeat_interleave(2, 0)[::2],
            "w_enc": args["w_enc"].T.contiguous().T,
            "b_enc": args["b_enc"].repeat_interleave(3)[::3],
            "b_pre": args["b_pre"].repeat_interleave(2)[::2],
        }
        assert strided["w_enc"].stride(1) != 1
        assert_same_codes(topk_encode(**strided, backend=backend), want)

    @modes
    def test_determinism_over_threads(self, case: TopkEncodeCase) -> None:
        args = TopkEncodeCase(300, 96, 700, 12, mode=case.mode).make(torch.float32)
        args["w_enc"].requires_grad_()
        args["x"].requires_grad_()
        before, seen = torch.get_num_threads(), []
        try:
            for threads in (1, 2, 3, 7):
                torch.set_num_threads(threads)
                got = topk_encode(**args)
                grads = torch.autograd.grad(got.values.square().sum(), (args["x"], args["w_enc"]))
                seen.append((*[t for t in got if t is not None], *grads))
        finally:
            torch.set_num_threads(before)
        for other in seen[1:]:
            assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


class TestEdges:
    @every_kernel
    @modes
    @pytest.mark.parametrize("value", [0.0, 2.0, 1e6])
    def test_a_wrong_guess_changes_nothing(
        self, case: TopkEncodeCase, value: float, backend: str
    ) -> None:
        args = case.make(torch.float32, device=DEVICE[backend])
        want = topk_encode(**args, backend=backend)
        for rows in (1, case.rows):
            guess = torch.full((rows,), value, device=args["x"].device)
            assert_same_codes(topk_encode(**args, guess=guess, backend=backend), want)

    @every_kernel
    @modes
    @pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-12, 1e12, 1e18])
    def test_extreme_scales(self, case: TopkEncodeCase, scale: float, backend: str) -> None:
        args = case.make(torch.float32, device=DEVICE[backend])
        args["x"][::2] *= scale
        args["w_enc"][::3] *= scale
        want = plain(args, dense(args, "fp32"))
        assert_same_codes(topk_encode(**args, backend=backend), want)

    @every_kernel
    def test_a_few_long_features_do_not_blind_the_screen(self, backend: str) -> None:
        """Bounds of a group of features hold for each of them, however their lengths differ."""
        args = TopkEncodeCase(64, 96, 2048, 8).make(torch.float32, device=DEVICE[backend])
        args["w_enc"][::97] *= 300.0
        topk_encode_fallbacks(reset=True)
        got = topk_encode(**args, backend=backend)
        assert topk_encode_fallbacks() == 0
        assert_same_codes(got, plain(args, dense(args, "fp32")))

    @every_kernel
    def test_rows_the_screen_cannot_decide_are_counted(self, backend: str) -> None:
        args = TopkEncodeCase(20, 20, 50, 4).make(torch.float32, device=DEVICE[backend])
        args["x"][3, 0] = 1e30
        args["x"][5, 0] = torch.nan
        topk_encode_fallbacks(reset=True)
        got = topk_encode(**args, backend=backend)
        assert topk_encode_fallbacks() == 2
        assert_same_codes(got, plain_nan(args))
        assert topk_encode_fallbacks(reset=True) == 2
        assert topk_encode_fallbacks() == 0

    @every_backend
    def test_no_features_are_active(self, backend: str) -> None:
        args = FIXED.make(torch.float32, device=DEVICE[backend])
        args["b_enc"] = args["b_enc"] - 100.0
        got = topk_encode(**args, backend=backend)
        assert (got.values == 0).all()
        assert (got.indices == -1).all()
        got = topk_encode(**(args | {"mode": "batch_topk"}), backend=backend)
        assert got.values.numel() == 0
        assert got.offsets is not None
        assert (got.offsets == 0).all()

    @every_backend
    @precisions
    @modes
    def test_nan_and_infinity_show(
        self, case: TopkEncodeCase, precision: str, backend: str
    ) -> None:
        """NaN before infinity before numbers, and never dropped."""
        args = case.make(torch.float32, device=DEVICE[backend])
        args["x"][1, 3] = torch.nan
        args["w_enc"][7, 2] = torch.nan
        args["w_enc"][9, 2] = torch.inf
        args["x"][2:, 2] = 1.0
        args["b_pre"][:] = 0.0
        args["b_enc"][11] = torch.inf
        got = topk_encode(**args, precision=precision, backend=backend)
        if got.offsets is None:
            assert got.indices[2:, :3].tolist() == [[7, 9, 11]] * 4
            assert got.values[1].isnan().all()
            assert got.indices[1].tolist() == [0, 1, 2, 3]
            return
        bad = got.values[got.offsets[1] : got.offsets[2]].isnan()
        if case.mode == "threshold":
            row = got.indices[got.offsets[2] : got.offsets[3]].tolist()
            assert {7, 9, 11} <= set(row)
            assert int(bad.sum()) == case.features
        else:  # the budget of 24 ends within the NaNs of row 1
            assert got.indices.tolist() == [7, *range(23)]
            assert int(bad.sum()) == 23


class TestGradients:
    @every_backend
    @modes
    @pytest.mark.parametrize("precision", ["fp32", "bf16"])
    def test_against_dense_autograd(
        self, case: TopkEncodeCase, precision: str, backend: str
    ) -> None:
        """Gradients of the dense encoder in float64 at the codes that were kept."""
        args = case.make(torch.float32, device=DEVICE[backend])
        names = ("x", "w_enc", "b_enc", "b_pre")
        for name in names:
            args[name].requires_grad_()
        got = topk_encode(**args, precision=precision, backend=backend)
        device = args["x"].device
        weight = torch.randn(got.values.shape, device=device)
        grads = torch.autograd.grad((got.values * weight).sum(), [args[n] for n in names])
        rows = torch.arange(case.rows, device=device)
        rows = rows[:, None].expand(-1, case.k) if got.offsets is None else (
            rows.repeat_interleave(got.offsets.diff()))  # fmt: skip
        active = got.indices >= 0

        def by_hand(dtype: torch.dtype) -> tuple[Tensor, ...]:
            leaves = {n: args[n].detach().to(dtype).requires_grad_() for n in names}
            x, w = leaves["x"] - leaves["b_pre"], leaves["w_enc"]
            if precision == "bf16":
                x32 = args["x"].detach() - args["b_pre"].detach()
                x = x + (x32.bfloat16().to(dtype) - x).detach()
                w = w + (w.bfloat16().to(dtype) - w).detach()
            z = (x @ w.T + leaves["b_enc"]).relu()
            picked = z[rows[active], got.indices[active].long()]
            loss = (picked * weight[active].to(dtype)).sum()
            return torch.autograd.grad(loss, [leaves[n] for n in names])

        for name, g, exact, eager in zip(
            names, grads, by_hand(torch.float64), by_hand(torch.float32), strict=True
        ):
            assert_close(name, g, exact, eager)

    @modes
    def test_gradcheck_of_the_reference(self, case: TopkEncodeCase) -> None:
        args = upcast(replace_size(case).make(torch.float32))
        tensors = [args.pop(n).requires_grad_() for n in ("x", "w_enc", "b_enc", "b_pre")]
        torch.autograd.gradcheck(
            lambda *t: topk_encode(*t, **args, backend="reference").values, tensors
        )

    @every_backend
    def test_only_what_is_asked_for(self, backend: str) -> None:
        args = FIXED.make(torch.float32, device=DEVICE[backend])
        args["b_enc"].requires_grad_()
        topk_encode(**args, backend=backend).values.sum().backward()
        assert args["b_enc"].grad is not None
        assert args["b_enc"].grad.sum() == (topk_encode(**args).indices >= 0).sum()
        assert args["x"].grad is args["w_enc"].grad is args["b_pre"].grad is None

    @dtypes
    def test_dtypes_of_gradients(self, dtype: torch.dtype) -> None:
        args = FIXED.make(dtype)
        for name in ("x", "w_enc", "b_enc", "b_pre"):
            args[name].requires_grad_()
        topk_encode(**args).values.sum().backward()
        for name in ("x", "w_enc", "b_enc", "b_pre"):
            assert args[name].grad.dtype == args[name].dtype

    def test_second_gradient_is_refused(self) -> None:
        args = FIXED.make(torch.float32)
        args["x"].requires_grad_()
        value = topk_encode(**args).values.square().sum()
        (g,) = torch.autograd.grad(value, args["x"], create_graph=True)
        with pytest.raises(NotImplementedError, match="expected one backward pass"):
            g.sum().backward()


def replace_size(case: TopkEncodeCase) -> TopkEncodeCase:
    return TopkEncodeCase(3, 4, 7, 2, mode=case.mode)


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
            topk_encode(**(args | change), backend=backend)

    @pytest.mark.parametrize("backend", ["fast", "", None])
    def test_unknown_backend(self, backend: Any) -> None:
        with pytest.raises(ValueError, match="expected backend to be one of auto, reference"):
            topk_encode(**FIXED.make(torch.float32), backend=backend)

    def test_absent_backend(self) -> None:
        with pytest.raises(RuntimeError, match="expected backend 'cuda' to be available, got:"):
            topk_encode(**FIXED.make(torch.float32), backend="cuda")


needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="Inductor needs a C++ compiler on the CPU"
)


class TestTorch:
    @modes
    @pytest.mark.parametrize("grad", [False, True])
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
            lambda **kw: topk_encode(**kw, backend=backend), fullgraph=True, dynamic=False
        )
        got, want = compiled(**args), topk_encode(**args, backend=backend)
        assert torch.equal(got.indices, want.indices)
        torch.testing.assert_close(got.values, want.values)
        grads = [torch.autograd.grad(c.values.sum(), args["w_enc"])[0] for c in (got, want)]
        torch.testing.assert_close(*grads)
