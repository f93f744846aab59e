# SPDX-License-Identifier: Apache-2.0
"""Every kernel in Triton's interpreter, which does not do bfloat16: `make test-python` runs it."""

from __future__ import annotations

import math

import pytest
import torch

from sidechain import _triton
from sidechain.ops import attention_tap
from sidechain.testing.cases import ATTENTION_CASES, AttentionCase
from triton_support import CALLS, Call, ran

pytestmark = pytest.mark.skipif(_triton.absent() is not None, reason=str(_triton.absent()))
INTERPRETED = [c for c in CALLS if c.interpreted]
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["f32", "f16"])


@dtypes
@pytest.mark.parametrize("call", INTERPRETED, ids=lambda c: f"{c.op}-{c.name}")
def test_against_float64(call: Call, dtype: torch.dtype) -> None:
    call.check(dtype, "cpu")
    ran["interpreter", call.op] += 1


class TestAttentionTap:
    @pytest.mark.parametrize("slot", [-1, 3, 2**40])
    def test_capture_slot_outside(self, slot: int) -> None:
        case = next(c for c in ATTENTION_CASES if c.what == "everything")
        args = case.make(torch.float16)
        args["capture_slot"].fill_(slot)
        before = {k: args[k].clone() for k in ("sums", "squares", "counts", "ring")}
        out = attention_tap(**args, backend="triton")
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
        assert torch.equal(attention_tap(**args, backend="triton"), torch.zeros(3, 20, 2, 16))
        assert torch.equal(args["sums"], before)

    def test_masked_context_is_not_read(self) -> None:
        args = AttentionCase(2, 20, 40, 2, 16, context_mask=True).make(torch.float32)
        expected = attention_tap(**args, backend="triton")
        for name in ("k_bank", "v_bank"):
            args[name][~args["context_mask"]] = math.nan
        assert torch.equal(attention_tap(**args, backend="triton"), expected)
        assert expected.isfinite().all()

    def test_arrivals_are_left_as_zeros(self) -> None:
        """A second launch on the same counters still folds exactly once."""
        from sidechain.triton_kernels import attention_tap as kernels

        shared = torch.zeros(64, dtype=torch.int32)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "arrival_counters", lambda n, device: shared)
            args = AttentionCase(2, 70, 9, 2, 16, sums=True).make(torch.float32)
            fresh = args["sums"].clone()
            attention_tap(**args, backend="triton")
            once = args["sums"] - fresh
            assert int(shared.abs().sum()) == 0
            args["sums"].zero_()
            attention_tap(**args, backend="triton")
        torch.testing.assert_close(args["sums"], once, rtol=1e-4, atol=1e-4)
