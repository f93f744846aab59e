# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ops.harness import dtypes
from ops.sae_update_calls import UPDATE, WRITTEN, call, plain, square
from ops.support import DEVICE, clone, upcast
from sidechain.ops import sae_gradient_square, sae_update_
from sidechain.reference.sae_update import round_stochastically, rounding_noise
from sidechain.testing.cases import DTYPES, UPDATE_CASES, UpdateCase, square_args, update_call

every_backend = UPDATE.every_backend
every_case = pytest.mark.parametrize("case", UPDATE_CASES, ids=lambda c: c.name)


class TestNumerics:
    @every_backend
    @dtypes
    @every_case
    def test_against_float64(self, case: UpdateCase, dtype: torch.dtype, backend: str) -> None:
        args = case.make(dtype, device=DEVICE[backend])
        UPDATE.check(args, UPDATE.run(args, backend=backend))

    @every_case
    def test_reference_against_plain(self, case: UpdateCase) -> None:
        if case.d_in > 1000:
            case = replace(case, d_in=50, d_out=21)
        args = case.make(torch.float64)
        got = UPDATE.run(upcast(args), backend="reference")
        for name, value in plain(args).items():
            torch.testing.assert_close(
                got[name], value, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
            )

    @settings(max_examples=20, deadline=None)
    @given(
        rows=st.integers(0, 40),
        d_in=st.integers(8, 90),  # a root mean square of few numbers says little
        d_out=st.integers(8, 90),
        features=st.integers(8, 60),
        k=st.integers(0, 12),
        groups=st.integers(1, 3),
        flags=st.tuples(*[st.booleans()] * 8),
        dtype=st.sampled_from(list(DTYPES.values())),
        seed=st.integers(0, 99),
    )
    def test_any_combination(
        self, rows: int, d_in: int, d_out: int, features: int, k: int, groups: int,
        flags: tuple[bool, ...], dtype: torch.dtype, seed: int,
    ) -> None:  # fmt: skip
        case = UpdateCase(
            rows, d_in, d_out, features, min(k, features), csr=flags[0], groups=groups,
            bias=flags[1], b_pre=flags[2], clip=flags[3], unit_norm=flags[4], project=flags[5],
            extras=flags[6], prefixes=((features + 1) // 2, features + 1) if flags[7] else (),
        )  # fmt: skip
        args = case.make(dtype, seed)
        UPDATE.check(args, UPDATE.run(args))


class TestRounding:
    def test_unbiased_and_to_a_neighbour(self) -> None:
        value = torch.randn(200).repeat(4000, 1)
        noise = rounding_noise(torch.tensor([3]), torch.arange(4000), 200) & 0xFFFF
        got = round_stochastically(value, noise).float()
        step = torch.finfo(torch.bfloat16).eps * value.abs()
        assert ((got - value).abs() <= step).all()
        # Four standard deviations of the mean of 4000 uniform rounding errors.
        bias = (got - value).mean(0)
        assert (bias.abs() <= 4 * step[0] / 4000**0.5).all()
        exact = value[0].to(torch.bfloat16)
        assert torch.equal(round_stochastically(exact.float(), noise[:1])[0], exact)

    def test_noise_is_fresh_and_uniform(self) -> None:
        key = torch.arange(64)
        a, b = (rounding_noise(torch.tensor([s]), key, 512) for s in (1, 2))
        assert (a != b).float().mean() > 0.999
        for half in (a & 0xFFFF, a >> 16):
            counts = torch.bincount((half >> 12).flatten(), minlength=16).double()
            expected = half.numel() / 16
            assert ((counts - expected).square() / expected).sum() < 45  # chi^2, 15 d.o.f.
        halves = torch.stack([(a & 0xFFFF).flatten(), (a >> 16).flatten()]).double()
        assert torch.corrcoef(halves)[0, 1].abs() < 0.03

    def test_not_finite_values_stay(self) -> None:
        value = torch.tensor([[float("inf"), -float("inf"), float("nan"), 0.0]])
        got = round_stochastically(value, torch.full((1, 4), 0xFFFF))[0]
        assert got[:2].tolist() == [float("inf"), -float("inf")]
        assert got[2].isnan()
        assert got[3].abs() < 1e-38

    @every_backend
    def test_kernels_draw_the_bits_of_the_reference(self, backend: str) -> None:
        """Exact where the arithmetic is: m = beta1 m needs no gradient, only rounding."""
        args = replace(UPDATE_CASES[0], half_state=True, k=0, d_in=77).make(
            torch.float32, device=DEVICE[backend]
        )
        args["beta1"] = args["beta2"] = 0.5
        for key in ("enc_mean", "enc_square", "dec_mean", "dec_square"):
            # Halving bfloat16 is exact, so a low bit is added that the rounding has to act on.
            args[key] = args[key].float().abs().add(1e-3).to(torch.bfloat16)
        args["beta1"], args["beta2"] = 0.75, 0.625
        got, want = UPDATE.run(args, backend=backend), UPDATE.run(args, backend="reference")
        for key in ("enc_mean", "enc_square", "dec_mean", "dec_square"):
            assert torch.equal(got[key], want[key]), key


class TestLayout:
    def test_determinism_over_threads(self) -> None:
        case = UpdateCase(300, 96, 64, 700, 16, groups=2, extras=True, half_state=True)
        UPDATE.check_threads(case.make(torch.bfloat16))

    @every_backend
    @dtypes
    def test_strided_inputs(self, dtype: torch.dtype, backend: str) -> None:
        args = replace(UPDATE_CASES[0], groups=2).make(dtype, device=DEVICE[backend])
        strided = ("x", "values", "indices", "dvalues", "error")
        for name in strided:
            lists = args[name] if isinstance(args[name], list) else [args[name]]
            views = []
            for t in lists:
                whole = t.new_zeros(2 * t.shape[0], t.shape[1] + 3)
                views.append(whole[::2, 1 : 1 + t.shape[1]].copy_(t))
            args[name] = views if isinstance(args[name], list) else views[0]
        UPDATE.check(
            args, UPDATE.call(args | {n: clone({n: args[n]})[n] for n in WRITTEN}, backend=backend)
        )


class TestEdges:
    @every_backend
    def test_zero_rows_stay_zero(self, backend: str) -> None:
        """A decoder row of zeros without momentum has no direction to be scaled to."""
        args = replace(UPDATE_CASES[0], k=0).make(torch.float32, device=DEVICE[backend])
        for name in ("w_dec", "dec_mean"):
            args[name][3] = 0.0
        got = UPDATE.run(args, backend=backend)["w_dec"]
        assert torch.equal(got[3], torch.zeros_like(got[3]))
        norms = got.norm(dim=1)
        others = torch.arange(len(norms), device=norms.device) != 3
        torch.testing.assert_close(norms[others], torch.ones_like(norms[others]))

    @every_backend
    def test_projection_leaves_no_component(self, backend: str) -> None:
        args = UPDATE_CASES[0].make(torch.float32, device=DEVICE[backend])
        args["dec_mean"].zero_()
        got = UPDATE.run(args, backend=backend)
        along = (got["dec_mean"] * args["w_dec"]).sum(1)
        assert (along.abs() <= 1e-6 * got["dec_mean"].norm(dim=1) + 1e-9).all()

    @every_backend
    def test_nan_stays_with_its_feature(self, backend: str) -> None:
        args = UPDATE_CASES[0].make(torch.float32, device=DEVICE[backend])
        args["dvalues"][0][2, 0] = float("nan")
        feature = int(args["indices"][0][2, 0])
        got = UPDATE.run(args, backend=backend)
        bad = got["w_enc"].isnan().any(1)
        assert bad.nonzero().flatten().tolist() == [feature]
        assert not got["w_dec"].isnan().any()


class TestTorch:
    @pytest.mark.parametrize("case", [UPDATE_CASES[i] for i in (1, 4, 5)], ids=lambda c: c.name)
    def test_opcheck(self, case: UpdateCase) -> None:
        args = case.make(torch.bfloat16)
        ours = torch.ops.sidechain
        torch.library.opcheck(ours.sae_update_.default, tuple(args.values()))
        torch.library.opcheck(ours.sae_gradient_square.default, tuple(square_args(args)))

    def test_autograd_notices_the_write(self) -> None:
        args = UPDATE_CASES[0].make(torch.float32)
        factor = torch.ones(1, requires_grad=True)
        loss = (args["w_dec"] * factor).sum()
        call(args)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    @pytest.mark.parametrize("name", ["w_enc", "w_dec", "b_enc", "x"])
    def test_gradient_is_refused(self, name: str) -> None:
        args = UPDATE_CASES[0].make(torch.float32)
        args[name].requires_grad_()
        for function in (call, square):
            with pytest.raises(NotImplementedError, match="sparse_decode is differentiable"):
                function(args)
        with torch.no_grad():
            call(args)


F64 = torch.zeros(1).double()
BAD = [
    ({"w_dec": 3}, TypeError, "expected w_dec to be a tensor, got int"),
    ({"w_enc": torch.zeros(69, 48)}, ValueError, r"w_enc of shape \[70, d_in\] \(F of w_dec\)"),
    ({"w_enc": torch.zeros(70, 48).half()}, TypeError, "w_enc of float32, got float16"),
    ({"w_enc": torch.zeros(140, 48)[::2]}, ValueError, "expected w_enc to be contiguous"),
    ({"enc_mean": torch.zeros(70, 48).half()}, TypeError, "enc_mean of float32 | bfloat16"),
    ({"dec_mean": torch.zeros(70, 48).bfloat16()}, TypeError, "dec_mean of float32, got bfloat16"),
    ({"dec_square": torch.zeros(70, 47)}, ValueError, r"dec_square of shape \[70, 48\]"),
    ({"bias_mean": None}, ValueError, "bias_mean to be given exactly when b_enc is, got None"),
    ({"b_enc": None}, ValueError, "exactly when b_enc is, got a tensor"),
    ({"x": torch.zeros(24, 47)}, ValueError, r"x of shape \[N, 48\] \(d_in of w_enc\)"),
    ({"b_pre": torch.zeros(49)}, ValueError, r"b_pre of shape \[48\]"),
    ({"values": [torch.zeros(24, 6).double()]}, TypeError, r"codes\[0\].values of float32"),
    ({"values": [torch.zeros(23, 6)]}, ValueError, r"codes\[0\].values of shape \[24, K\]"),
    ({"indices": [torch.zeros(24, 5).int()]}, ValueError, r"codes\[0\].indices of shape"),
    ({"dvalues": [torch.zeros(24, 5)]}, ValueError, r"codes\[0\].dvalues of shape \[24, 6\]"),
    ({"error": [torch.zeros(2, 24, 48)]}, ValueError, r"codes\[0\].error of shape \[24, 48\]"),
    ({"row_weight": [torch.zeros(23)]}, ValueError, r"codes\[0\].row_weight of shape \[24\]"),
    ({"prefixes": [10, 70]}, ValueError, r"codes\[0\].error of shape \[2, 24, 48\]"),
    ({"prefixes": [10, 10, 70]}, ValueError, "expected ascending prefixes that end at 70"),
    ({"prefixes": [10, 69]}, ValueError, "expected ascending prefixes that end at 70"),
    ({"prefixes": list(range(60, 77))}, ValueError, "expected at most 16 prefixes, got 17"),
    ({"first_feature": -1}, ValueError, "expected first_feature >= 0, got -1"),
    ({"lr": torch.tensor(0.1)}, ValueError, r"lr of shape \[1\] .*got \[\]"),
    ({"lr": F64}, TypeError, "lr of float32, got float64"),
    ({"step": torch.ones(1)}, TypeError, "step of int64, got float32"),
    ({"beta2": 1.0}, ValueError, "expected 0 <= beta2 < 1, got 1.0"),
    ({"eps": -1.0}, ValueError, "expected 0 <= eps < inf, got -1.0"),
    ({"weight_decay": float("nan")}, ValueError, "expected 0 <= weight_decay < inf, got nan"),
    ({"clip_scale": torch.ones(2)}, ValueError, r"clip_scale of shape \[1\]"),
    ({"last_fired": torch.zeros(70)}, TypeError, "last_fired of int64, got float32"),
    ({"last_fired": torch.zeros(71).long()}, ValueError, r"last_fired of shape \[70\]"),
    ({"b_pre_grad": torch.zeros(47)}, ValueError, r"b_pre_grad of shape \[48\]"),
    ({"b_pre_grad": torch.zeros(48, device="meta")}, RuntimeError, "b_pre_grad on cpu"),
]


class TestContract:
    @pytest.mark.parametrize("backend", ["auto", "reference"])
    @pytest.mark.parametrize(("change", "error", "match"), BAD, ids=[b[2][:40] for b in BAD])
    def test_bad_calls(
        self, change: dict[str, Any], error: type[Exception], match: str, backend: str
    ) -> None:
        args = UPDATE_CASES[0].make(torch.float32)
        before = clone(args)
        with pytest.raises(error, match="^sae_update_: .*" + match):
            call(args | change, backend=backend)
        for name in WRITTEN:
            if args[name] is not None:
                assert torch.equal(args[name], before[name]), f"{name} was written"

    @pytest.mark.parametrize("square", [False, True], ids=["update", "square"])
    def test_structs(self, square: bool) -> None:
        (weights, state, inputs, adam), _ = update_call(UPDATE_CASES[0].make(torch.float32))
        op = "sae_gradient_square" if square else "sae_update_"

        def run(inputs: Any, weights: Any = weights, state: Any = state, adam: Any = adam) -> None:
            if square:
                sae_gradient_square(weights, inputs)
            else:
                sae_update_(weights, state, inputs, adam)

        with pytest.raises(ValueError, match=f"^{op}: expected at least one CodeGroup, got none"):
            run(inputs._replace(codes=[]))
        with pytest.raises(ValueError, match="expected at most 4 groups of codes, got 5"):
            run(inputs._replace(codes=inputs.codes * 5))
        with pytest.raises(TypeError, match=f"^{op}: expected codes to be CodeGroup, got Tensor"):
            run(inputs._replace(codes=inputs.codes[0]))  # without a list
        for name, kind in (("weights", "SaeWeights"), ("state", "AdamState"),
                           ("adam", "AdamOptions")):  # fmt: skip
            if name == "weights" or not square:
                with pytest.raises(TypeError, match=f"expected {name} to be {kind}, got tuple"):
                    run(inputs, **{name: ()})
        with pytest.raises(TypeError, match="expected inputs to be GradientInputs, got tuple"):
            run(())

    def test_absent_backend(self) -> None:
        with pytest.raises(RuntimeError, match="expected backend 'triton' to be available, got:"):
            call(UPDATE_CASES[0].make(torch.float32), backend="triton")
