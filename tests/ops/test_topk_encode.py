# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ops.support import DEVICE, clone, guarded, guards_intact
from ops.topk_encode_codes import (
    assert_same_codes,
    dense,
    dtypes,
    every_kernel,
    exact_kernels,
    modes,
    plain,
    screened_modes,
    widened,
)
from sidechain.ops import Codes, backends, topk_encode_fallbacks
from sidechain.testing.cases import TOPK_ENCODE_CASES, TopkEncodeCase, encode_case
from sidechain.testing.tolerance import assert_close


class TestNumerics:
    @dtypes
    @pytest.mark.parametrize("precision", ["fp32", "bf16"])
    @pytest.mark.parametrize(
        "case", [c for c in TOPK_ENCODE_CASES if c.mode != "threshold"], ids=lambda c: c.name
    )
    def test_values_of_the_reference(
        self, case: TopkEncodeCase, precision: str, dtype: torch.dtype
    ) -> None:
        """The sorted values, which near ties do not change, under the tolerance of all ops."""
        args = case.make(dtype)
        got = encode_case(args, precision=precision, backend="reference")
        z, eager = dense(args, precision), dense(args, precision, torch.float32)
        if case.mode == "topk":
            want, other = (t.sort(descending=True).values[:, : case.k] for t in (z, eager))
            have = got.values
        else:
            total = min(case.rows * case.k, int((z > 0).sum()))
            want, other = (t.flatten().sort(descending=True).values[:total] for t in (z, eager))
            have = got.values.sort(descending=True).values
        assert have.dtype == torch.float32
        assert_close("values", have, want.double(), other)

    @pytest.mark.parametrize("case", TOPK_ENCODE_CASES, ids=lambda c: c.name)
    def test_reference_against_plain(self, case: TopkEncodeCase) -> None:
        args = widened(case.make(torch.float32))
        want = plain(args, dense(args))
        got = encode_case(args, backend="reference")
        assert got.values.dtype == torch.float64
        assert_same_codes(Codes(got.values.float(), *got[1:]), want)

    @exact_kernels
    @dtypes
    @pytest.mark.parametrize("case", TOPK_ENCODE_CASES, ids=lambda c: c.name)
    def test_exact_set(
        self, case: TopkEncodeCase, precision: str, dtype: torch.dtype, backend: str
    ) -> None:
        """The set, the order and the values of the float64 problem, whatever guess is given."""
        args = case.make(dtype, device=DEVICE[backend])
        got = encode_case(args, precision=precision, backend=backend)
        assert got.values.dtype == torch.float32
        assert got.indices.dtype == torch.int32
        assert_same_codes(got, plain(args, dense(args, precision)))

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
        assert_same_codes(encode_case(args), plain(args, dense(args)))

    @every_kernel
    @pytest.mark.parametrize("data", ["random", "planted", "outliers"])
    def test_screen_decides_and_int8_recalls(self, data: str, backend: str) -> None:
        """The certificate holds without falling back; 8 bits alone miss next to nothing."""
        case = TopkEncodeCase(256, 256, 4096, 16, data=data)
        args = case.make(torch.float32, device=DEVICE[backend])
        topk_encode_fallbacks(reset=True)
        exact = encode_case(args, backend=backend)
        assert topk_encode_fallbacks() == 0
        near = encode_case(args, precision="int8", backend=backend)
        found = (near.indices[:, :, None] == exact.indices[:, None]).any(-1)
        assert found.float().mean() > 0.995
        z = dense(args)
        picked = z.gather(1, near.indices.long())
        torch.testing.assert_close(near.values, picked, rtol=1.3e-7, atol=1e-12)

    @every_kernel
    def test_threshold_of_int8_keeps_no_stranger(self, backend: str) -> None:
        case = TopkEncodeCase(64, 128, 512, 1, mode="threshold")
        args = case.make(torch.float32, device=DEVICE[backend])
        exact = encode_case(args, backend=backend)
        near = encode_case(args, precision="int8", backend=backend)
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
    @screened_modes
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
        want = encode_case(args, backend=backend)
        assert_same_codes(encode_case(moved, backend=backend), want)
        for name, whole in wholes.items():
            assert guards_intact(whole, moved[name], offset), name

    @every_kernel
    @screened_modes
    def test_any_strides(self, case: TopkEncodeCase, backend: str) -> None:
        args = case.make(torch.float32, device=DEVICE[backend])
        want = encode_case(args, backend=backend)
        strided = args | {
            "x": args["x"].repeat_interleave(2, 0)[::2],
            "w_enc": args["w_enc"].T.contiguous().T,
            "b_enc": args["b_enc"].repeat_interleave(3)[::3],
            "b_pre": args["b_pre"].repeat_interleave(2)[::2],
        }
        assert strided["w_enc"].stride(1) != 1
        assert_same_codes(encode_case(strided, backend=backend), want)

    @modes
    def test_determinism_over_threads(self, case: TopkEncodeCase) -> None:
        args = TopkEncodeCase(300, 96, 700, 12, mode=case.mode).make(torch.float32)
        args["w_enc"].requires_grad_()
        args["x"].requires_grad_()
        before, seen = torch.get_num_threads(), []
        try:
            for threads in (1, 2, 3, 7):
                torch.set_num_threads(threads)
                got = encode_case(args)
                grads = torch.autograd.grad(got.values.square().sum(), (args["x"], args["w_enc"]))
                seen.append((*[t for t in got if t is not None], *grads))
        finally:
            torch.set_num_threads(before)
        for other in seen[1:]:
            assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))
