# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ops.support import DEVICE
from ops.topk_encode_codes import (
    EXACT,
    FIXED,
    KERNELS,
    assert_same_codes,
    dense,
    every_backend,
    every_kernel,
    modes,
    plain,
    plain_nan,
    screened_modes,
)
from sidechain.ops import topk_encode_fallbacks
from sidechain.testing.cases import TopkEncodeCase, encode_case

EVERY_PRECISION = [*EXACT, *(pytest.param(*p.values, "int8", marks=p.marks) for p in KERNELS)]


class TestEdges:
    @every_kernel
    @screened_modes
    @pytest.mark.parametrize("value", [0.0, 2.0, 1e6])
    def test_a_wrong_guess_changes_nothing(
        self, case: TopkEncodeCase, value: float, backend: str
    ) -> None:
        args = case.make(torch.float32, device=DEVICE[backend])
        want = encode_case(args, backend=backend)
        for rows in (1, case.rows):
            guess = torch.full((rows,), value, device=args["x"].device)
            assert_same_codes(encode_case(args, guess=guess, backend=backend), want)

    @every_kernel
    @pytest.mark.parametrize("mode", ["topk", "batch_topk"])
    def test_a_wrong_estimate_changes_nothing(self, mode: str, backend: str) -> None:
        """The rows that are measured first have much larger k-th values than the others."""
        case = TopkEncodeCase(256, 24, 120, 4, mode=mode)
        args = case.make(torch.float32, device=DEVICE[backend])
        args["w_enc"][:4] = args["w_enc"][0] + 0.1 * args["w_enc"][:4]
        measured = torch.arange(12) * 256 // 12 if mode == "topk" else torch.arange(64) * 4
        args["x"][measured] = 100.0 * args["w_enc"][0] + args["x"][measured]
        got = encode_case(args, backend=backend)
        assert_same_codes(got, plain(args, dense(args)))

    @every_kernel
    @screened_modes
    @pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-12, 1e12, 1e18])
    def test_extreme_scales(self, case: TopkEncodeCase, scale: float, backend: str) -> None:
        args = case.make(torch.float32, device=DEVICE[backend])
        args["x"][::2] *= scale
        args["w_enc"][::3] *= scale
        want = plain(args, dense(args))
        assert_same_codes(encode_case(args, backend=backend), want)

    @every_kernel
    def test_a_few_long_features_do_not_blind_the_screen(self, backend: str) -> None:
        """Bounds of a group of features hold for each of them, however their lengths differ."""
        args = TopkEncodeCase(64, 96, 2048, 8).make(torch.float32, device=DEVICE[backend])
        args["w_enc"][::97] *= 300.0
        topk_encode_fallbacks(reset=True)
        got = encode_case(args, backend=backend)
        assert topk_encode_fallbacks() == 0
        assert_same_codes(got, plain(args, dense(args)))

    @every_kernel
    def test_rows_the_screen_cannot_decide_are_counted(self, backend: str) -> None:
        args = TopkEncodeCase(20, 20, 50, 4).make(torch.float32, device=DEVICE[backend])
        args["x"][3, 0] = 1e30
        args["x"][5, 0] = torch.nan
        topk_encode_fallbacks(reset=True)
        got = encode_case(args, backend=backend)
        assert topk_encode_fallbacks() == 2
        assert_same_codes(got, plain_nan(args))
        assert topk_encode_fallbacks(reset=True) == 2
        assert topk_encode_fallbacks() == 0

    @every_backend
    def test_no_features_are_active(self, backend: str) -> None:
        args = FIXED.make(torch.float32, device=DEVICE[backend])
        args["b_enc"] = args["b_enc"] - 100.0
        got = encode_case(args, backend=backend)
        assert (got.values == 0).all()
        assert (got.indices == -1).all()
        got = encode_case(args | {"mode": "batch_topk"}, backend=backend)
        assert got.values.numel() == 0
        assert got.offsets is not None
        assert (got.offsets == 0).all()

    @pytest.mark.parametrize(("backend", "precision"), EVERY_PRECISION)
    @modes
    @pytest.mark.parametrize("rows", [6, 12])  # a CPU screens the larger
    def test_nan_and_infinity_show(
        self, rows: int, case: TopkEncodeCase, precision: str, backend: str
    ) -> None:
        """NaN before infinity before numbers, and never dropped."""
        case = replace(case, rows=rows)
        args = case.make(torch.float32, device=DEVICE[backend])
        args["x"][1, 3] = torch.nan
        args["w_enc"][7, 2] = torch.nan
        args["w_enc"][9, 2] = torch.inf
        args["x"][2:, 2] = 1.0
        args["b_pre"][:] = 0.0
        args["b_enc"][11] = torch.inf
        got = encode_case(args, precision=precision, backend=backend)
        if got.offsets is None:
            assert got.indices[2:, :3].tolist() == [[7, 9, 11]] * (rows - 2)
            assert got.values[1].isnan().all()
            assert got.indices[1].tolist() == [0, 1, 2, 3]
            return
        bad = got.values[got.offsets[1] : got.offsets[2]].isnan()
        if case.mode == "threshold":
            row = got.indices[got.offsets[2] : got.offsets[3]].tolist()
            assert {7, 9, 11} <= set(row)
            assert int(bad.sum()) == case.features
        else:  # the budget ends within the 50 NaNs of row 1
            assert got.indices.tolist() == [7, *range(4 * rows - 1)]
            assert int(bad.sum()) == 4 * rows - 1
