# SPDX-License-Identifier: Apache-2.0
"""Every kernel in Triton's interpreter, which does not do bfloat16: `make test-python` runs it."""

from __future__ import annotations

import math

import pytest
import torch

import shown
from ops.topk_encode_codes import assert_same_codes, dense, plain, plain_nan
from sidechain import _triton
from sidechain.ops import attention_tap, topk_encode_fallbacks
from sidechain.testing.cases import (
    ATTENTION_CASES,
    AttentionCase,
    TopkEncodeCase,
    encode_case,
    structured,
)
from triton_support import CALLS, Call

pytestmark = pytest.mark.skipif(_triton.absent() is not None, reason=str(_triton.absent()))
INTERPRETED = [c for c in CALLS if c.interpreted]
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["f32", "f16"])


@dtypes
@pytest.mark.parametrize("call", INTERPRETED, ids=lambda c: f"{c.op}-{c.name}")
def test_against_float64(call: Call, dtype: torch.dtype) -> None:
    call.check(dtype, "cpu")
    shown.CASES[f"triton interpreter: {call.op}"] += 1


class TestAttentionTap:
    @pytest.mark.parametrize("slot", [-1, 3, 2**40])
    def test_capture_slot_outside(self, slot: int) -> None:
        case = next(c for c in ATTENTION_CASES if c.what == "everything")
        args = case.make(torch.float16)
        args["capture_slot"].fill_(slot)
        before = {k: args[k].clone() for k in ("sums", "squares", "counts", "ring")}
        out = attention_tap(**structured(args), backend="triton")
        assert out.isfinite().all()
        for name, value in before.items():
            assert torch.equal(args[name], value), name

    def test_dead_rows_read_nothing(self) -> None:
        args = AttentionCase(3, 20, 40, 2, 16, sums=True, context_mask=True).make(torch.float32)
        args["context_index"] = torch.tensor([-1, 3, 2], dtype=torch.int32)
        args["context_mask"][2] = False
        for name in ("q", "k_bank", "v_bank"):
            args[name].fill_(math.nan)
        before = args["sums"].clone()
        assert torch.equal(
            attention_tap(**structured(args), backend="triton"), torch.zeros(3, 20, 2, 16)
        )
        assert torch.equal(args["sums"], before)

    def test_masked_context_is_not_read(self) -> None:
        args = AttentionCase(2, 20, 40, 2, 16, context_mask=True).make(torch.float32)
        expected = attention_tap(**structured(args), backend="triton")
        for name in ("k_bank", "v_bank"):
            args[name][~args["context_mask"]] = math.nan
        assert torch.equal(attention_tap(**structured(args), backend="triton"), expected)
        assert expected.isfinite().all()

    def test_arrivals_are_left_as_zeros(self) -> None:
        """A second launch on the same counters still folds exactly once."""
        from sidechain.triton_kernels import attention_tap as kernels

        shared = torch.zeros(64, dtype=torch.int32)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "arrival_counters", lambda n, device: shared)
            args = AttentionCase(2, 70, 9, 2, 16, sums=True).make(torch.float32)
            fresh = args["sums"].clone()
            attention_tap(**structured(args), backend="triton")
            once = args["sums"] - fresh
            assert int(shared.abs().sum()) == 0
            args["sums"].zero_()
            attention_tap(**structured(args), backend="triton")
        torch.testing.assert_close(args["sums"], once, rtol=1e-4, atol=1e-4)


class TestTopkEncode:
    MODES = ("topk", "batch_topk", "threshold")
    modes = pytest.mark.parametrize("mode", MODES)
    # For k = 4, groups of one feature and of 16, the last one shorter.
    sizes = pytest.mark.parametrize("features", [50, 603])

    @modes
    @sizes
    def test_chunks_of_rows(
        self, features: int, mode: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from sidechain.triton_kernels import _topk_screen

        monkeypatch.setattr(_topk_screen, "chunk_rows", lambda features, width: 3)
        args = TopkEncodeCase(8, 20, features, 4, mode=mode).make(torch.float32)
        if mode == "threshold":  # low and high ones in one group
            args["threshold"] = 0.5 + 2.5 * (torch.arange(features) % 2)
        got = encode_case(args, backend="triton")
        assert_same_codes(got, plain(args, dense(args)))

    @modes
    @sizes
    @pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-12, 1e18])
    def test_extreme_scales(self, features: int, mode: str, scale: float) -> None:
        args = TopkEncodeCase(6, 20, features, 4, mode=mode).make(torch.float32)
        args["x"][::2] *= scale
        args["w_enc"][::3] *= scale
        got = encode_case(args, backend="triton")
        assert_same_codes(got, plain(args, dense(args)))

    def test_rows_the_screen_cannot_decide_are_counted(self) -> None:
        args = TopkEncodeCase(5, 20, 50, 4).make(torch.float32)
        args["x"][3, 0] = 1e30
        args["x"][4, 0] = math.nan
        topk_encode_fallbacks(reset=True)
        got = encode_case(args, backend="triton")
        assert topk_encode_fallbacks(reset=True) == 2
        assert_same_codes(got, plain_nan(args))

    def test_lists_that_overflow_are_valued_in_full(self) -> None:
        """More equal values than a row has slots: the lowest indices stay."""
        args = TopkEncodeCase(3, 8, 300, 4, b_enc=False).make(torch.float32)
        args["w_enc"][50:] = args["w_enc"][50]
        args["x"] = args["w_enc"][49:52] * 4.0
        args.pop("b_pre")
        topk_encode_fallbacks(reset=True)
        got = encode_case(args, backend="triton")
        assert topk_encode_fallbacks(reset=True) == 2
        assert_same_codes(got, plain(args, dense(args)))

    def test_one_row_takes_the_budget_of_the_batch(self) -> None:
        """Its list ends above the last value kept: the screen runs again from there."""
        args = TopkEncodeCase(6, 20, 400, 2, mode="batch_topk", b_enc=False).make(torch.float32)
        args["x"][1:] = args["b_pre"]
        topk_encode_fallbacks(reset=True)
        got = encode_case(args | {"k": 6}, backend="triton")
        assert_same_codes(got, plain(args | {"k": 6}, dense(args)))
        got = encode_case(args | {"k": 10}, backend="triton")
        assert_same_codes(got, plain(args | {"k": 10}, dense(args)))

    @modes
    @pytest.mark.parametrize("features", [300, 1024])
    @pytest.mark.parametrize("lossy", ["w_enc", "x"])
    def test_what_float16_puts_in_a_wrong_order(self, lossy: str, features: int, mode: str) -> None:
        """All that is in the codes was rounded down, and 32 features below them up."""
        args = TopkEncodeCase(3, 64, features, 8, mode, b_pre=False, b_enc=False).make(
            torch.float32
        )
        step, half = 2.0**-10, torch.arange(64) < 32  # float16 has steps of 2^-10 from 1 to 2
        # In groups of their own, the last group of all among them.
        at = torch.arange(features - 1, 0, -(features // 40))[:40]
        near = torch.zeros(40, 64)
        if lossy == "w_enc":
            near[:] = torch.where(half, 1.0 + 0.51 * step, 1.0)
            near[::5] = 1.0 + 0.49 * step - 1e-6 * torch.arange(8)[:, None]
            args["x"][:] = 4.0
        else:
            near[:] = (~half).float()
            near[::5] = half.float()
            near[::5, 0] = 1.0 + step
            args["x"][:] = torch.where(half, 1.0 + 0.49 * step, 1.0 + 0.51 * step)
        args["w_enc"][at] = near
        z = dense(args)
        assert (z >= z[:, at[::5]].min()).sum() == 3 * 8
        if mode == "threshold":
            args["threshold"] = float(z[0].sort(descending=True).values[7:9].mean())
        topk_encode_fallbacks(reset=True)
        got = encode_case(args, backend="triton")
        assert topk_encode_fallbacks(reset=True) == 0
        assert_same_codes(got, plain(args, z))

    @pytest.mark.parametrize("guess", [0.0, 2.0, 1e6])
    def test_a_wrong_guess_changes_nothing(self, guess: float) -> None:
        args = TopkEncodeCase(6, 20, 50, 4, mode="batch_topk").make(torch.float32)
        got = encode_case(args, guess=torch.full((6,), guess), backend="triton")
        assert_same_codes(got, plain(args, dense(args)))

    def test_a_pool_too_small_is_made_larger(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from sidechain.triton_kernels import topk_encode_ragged

        monkeypatch.setattr(topk_encode_ragged, "THRESHOLD_SLOTS", 1)
        args = TopkEncodeCase(6, 20, 50, 4, mode="threshold").make(torch.float32)
        args["threshold"] = 0.0
        got = encode_case(args, backend="triton")
        assert_same_codes(got, plain(args, dense(args)))

    @modes
    @sizes
    def test_nan_and_infinity_show(self, features: int, mode: str) -> None:
        args = TopkEncodeCase(6, 20, features, 4, mode=mode).make(torch.float32)
        args["x"][1, 3] = math.nan
        args["w_enc"][7, 2] = math.nan
        args["w_enc"][9, 2] = math.inf
        args["x"][2:, 2] = 1.0
        args["b_pre"][:] = 0.0
        args["b_enc"][11] = math.inf
        args["b_enc"][40] = math.nan
        got = encode_case(args, backend="triton")
        wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in args.items()}
        want = encode_case(wide, backend="reference")
        assert_same_codes(got, want._replace(values=want.values.float()))

    def test_no_features_are_active(self) -> None:
        args = TopkEncodeCase(6, 20, 50, 4).make(torch.float32)
        args["b_enc"] -= 100.0
        got = encode_case(args, backend="triton")
        assert (got.values == 0).all()
        assert (got.indices == -1).all()
