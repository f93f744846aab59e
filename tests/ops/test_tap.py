# SPDX-License-Identifier: Apache-2.0
"""`tap_`: numbers on every backend, any layout."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ops.harness import dtypes
from ops.support import DEVICE, upcast
from ops.tap_calls import TAP, plain
from sidechain.testing.cases import DTYPES, TAP_CASES, TAP_LIMITS, TapCase


class TestNumerics:
    @TAP.every_backend
    @dtypes
    @pytest.mark.parametrize("case", TAP_CASES + TAP_LIMITS, ids=lambda c: c.name)
    def test_against_float64(self, case: TapCase, dtype: torch.dtype, backend: str) -> None:
        args = case.make(dtype, device=DEVICE[backend])
        TAP.check(args, TAP.run(args, backend=backend))

    @pytest.mark.parametrize(
        "case", [c for c in TAP_CASES if c.tokens <= 257], ids=lambda c: c.name
    )
    def test_reference_against_plain(self, case: TapCase) -> None:
        args = upcast(case.make(torch.float64))
        y, captures = plain(args)
        got = TAP.run(args, backend="reference")
        torch.testing.assert_close(got["x"], y, rtol=1e-10, atol=1e-10)
        for name, value in captures.items():
            torch.testing.assert_close(got[name], value, rtol=1e-10, atol=1e-10)

    @settings(max_examples=60, deadline=None)
    @given(
        rows=st.integers(0, 5),
        tokens=st.integers(0, 140),
        channels=st.integers(1, 70),
        flags=st.tuples(*[st.booleans()] * 7),
        masks=st.tuples(st.integers(0, 2), st.integers(0, 2)),
        dtype=st.sampled_from(list(DTYPES.values())),
        seed=st.integers(0, 99),
    )
    def test_any_combination(
        self,
        rows: int,
        tokens: int,
        channels: int,
        flags: tuple[bool, ...],
        masks: tuple[int, int],
        dtype: torch.dtype,
        seed: int,
    ) -> None:
        case = TapCase(
            rows, tokens, channels,
            strength=flags[0], removal=flags[1], renorm=flags[2], index=flags[3] and any(flags[:2]),
            steer_mask=(None, 1, max(rows, 1))[masks[0]] if any(flags[:2]) and rows else None,
            sums=flags[4], squares=flags[5], counts=flags[6],
            ring=dtype if flags[4] != flags[5] else None,
            capture_mask=(None, 1, max(rows, 1))[masks[1]] if rows else None,
        )  # fmt: skip
        args = case.make(dtype, seed)
        TAP.check(args, TAP.run(args))

    def test_cancelling_renorm(self) -> None:
        """The norm of y is exact where y is much shorter than its parts."""
        v = torch.nn.functional.normalize(torch.randn(1, 1, 512), dim=-1)
        noise = torch.randn(1, 9, 512)
        noise -= (noise * v).sum(-1, keepdim=True) * v
        x = 100.0 * v.expand(1, 9, 512) + 1e-2 * noise
        args = {"x": x, "vectors": v, "strength": torch.tensor([-100.0]), "renorm": True}
        got = TAP.run(args)["x"]
        torch.testing.assert_close(got.norm(dim=-1), x.norm(dim=-1), rtol=1e-5, atol=0)


class TestLayout:
    @TAP.every_backend
    @dtypes
    @pytest.mark.parametrize("offset", range(18))
    def test_offset_views_and_guards(self, offset: int, dtype: torch.dtype, backend: str) -> None:
        """Every buffer, read or written, lies between sentinels."""
        args = TapCase(
            2, 5, 23, removal=True, renorm=True, index=True, steer_mask=2, sums=True, squares=True,
            counts=True, ring=dtype, capture_mask=2,
        ).make(dtype, device=DEVICE[backend])  # fmt: skip
        tensors = [name for name, value in args.items() if isinstance(value, Tensor)]
        TAP.check_guarded(args, tensors, offset, backend=backend)

    @TAP.every_backend
    @dtypes
    @pytest.mark.parametrize("channels", [1, 7, 64, 1280, 2560, 3072])
    @pytest.mark.parametrize("tokens", [0, 1, 18])
    def test_channels(self, tokens: int, channels: int, dtype: torch.dtype, backend: str) -> None:
        case = TapCase(
            1, tokens, channels, removal=True, renorm=True, sums=True, squares=True, counts=True,
            ring=torch.float16,
        )  # fmt: skip
        for rows in (1, 2):
            args = replace(case, rows=rows).make(dtype, device=DEVICE[backend])
            TAP.check(args, TAP.run(args, backend=backend))

    @TAP.every_backend
    @dtypes
    @pytest.mark.parametrize("channels", [32, 36])
    @pytest.mark.parametrize("name", ["x", "vectors", "sums", "squares", "ring"])
    def test_one_buffer_off_its_alignment(
        self, name: str, channels: int, dtype: torch.dtype, backend: str
    ) -> None:
        """What the others allow is not taken for granted of one."""
        args = TapCase(
            2, 21, channels, removal=True, renorm=True, sums=True, squares=True, counts=True,
            ring=dtype,
        ).make(dtype, device=DEVICE[backend])  # fmt: skip
        for offset in (1, 2, 4):
            TAP.check_guarded(args, [name], offset, backend=backend)

    @TAP.every_backend
    @dtypes
    def test_strided_outer_dims(self, dtype: torch.dtype, backend: str) -> None:
        case = TapCase(
            3, 10, 48, renorm=True, index=True, steer_mask=3, sums=True, squares=True, counts=True,
            ring=torch.float32, capture_mask=3,
        )  # fmt: skip
        args = case.make(dtype, device=DEVICE[backend])
        TAP.check_strided(args, backend=backend)
        transposed = args["x"].new_empty(10, 3, 48).transpose(0, 1).copy_(args["x"])
        TAP.check(args, TAP.run(args | {"x": transposed}, backend=backend))

    def test_determinism_over_threads(self) -> None:
        args = TapCase(
            3, 700, 96, removal=True, renorm=True, sums=True, squares=True, counts=True
        ).make(torch.float32)
        TAP.check_threads(args)
