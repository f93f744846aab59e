# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
import shutil
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ops.harness import CAPTURES, Harness, capture_refusals, dtypes
from ops.support import DEVICE, clone, guarded, guards_intact, upcast
from sidechain.ops import attention_tap, backends
from sidechain.reference import attention_tap as reference
from sidechain.testing.cases import ATTENTION_CASES, DTYPES, AttentionCase, structured

EVERYTHING = next(c for c in ATTENTION_CASES if c.what == "everything")


def _call(args: dict[str, Any], **more: Any) -> dict[str, Tensor]:
    out = attention_tap(**structured(args), **more)
    return {"out": out} | {name: args[name] for name in CAPTURES if name in args}


ATTENTION = Harness("attention_tap", _call)


def plain(args: dict[str, Any]) -> dict[str, Tensor]:
    """Row by row and head by head in NumPy float64, written from the docstring."""
    q, k, v = (args[n].double().numpy() for n in ("q", "k_bank", "v_bank"))
    rows, tokens, heads, width = q.shape
    out = np.zeros(q.shape)
    scale = args.get("scale", 1.0 / math.sqrt(width))
    for r in range(rows):
        m = int(args["context_index"][r]) if "context_index" in args else 0
        if not 0 <= m < k.shape[0]:
            continue
        mask = args.get("context_mask")
        read = np.arange(k.shape[1]) if mask is None else np.flatnonzero(mask[m].numpy())
        for h in range(heads if read.size else 0):
            g = h * k.shape[2] // heads
            scores = scale * q[r, :, h] @ k[m, read, g].T
            p = np.exp(scores - scores.max(1, keepdims=True))
            out[r, :, h] = p / p.sum(1, keepdims=True) @ v[m, read, g]
    result = {"out": out}
    buffers = {name: args[name].double().numpy().copy() for name in CAPTURES if name in args}
    for r in range(rows):
        flat = out[r].reshape(tokens, heads * width)
        slot = int(args.get("capture_slot", [0])[0])
        held = np.ones(tokens, bool)
        if "capture_mask" in args:
            held = args["capture_mask"].expand(rows, tokens)[r].numpy()
        for name, power in (("sums", 1), ("squares", 2)):
            if name in buffers:
                buffers[name][slot, r] += (flat[held] ** power).sum(0)
        if "counts" in buffers:
            buffers["counts"][slot, r] += held.sum()
        if "ring" in buffers:
            buffers["ring"][slot, r, held] = flat[held]
    return {name: torch.from_numpy(value) for name, value in (result | buffers).items()}


class TestNumerics:
    @ATTENTION.every_backend
    @dtypes
    @pytest.mark.parametrize("case", ATTENTION_CASES, ids=lambda c: c.name)
    def test_against_float64(self, case: AttentionCase, dtype: torch.dtype, backend: str) -> None:
        args = case.make(dtype, device=DEVICE[backend])
        ATTENTION.check(args, ATTENTION.run(args, backend=backend))

    @pytest.mark.parametrize("case", ATTENTION_CASES, ids=lambda c: c.name)
    def test_reference_against_plain(self, case: AttentionCase) -> None:
        args = upcast(case.make(torch.float64))
        got = ATTENTION.run(args, backend="reference")
        for name, value in plain(args).items():
            torch.testing.assert_close(got[name], value, rtol=1e-10, atol=1e-10)

    @settings(max_examples=50, deadline=None)
    @given(
        rows=st.integers(0, 4),
        tokens=st.integers(0, 70),
        context=st.integers(1, 60),
        groups=st.tuples(st.integers(1, 3), st.integers(1, 3)),
        width=st.integers(1, 128),
        flags=st.tuples(*[st.booleans()] * 6),
        mask=st.sampled_from([None, 1, "R"]),
        scale=st.sampled_from([None, 0.0, -0.2, 1.5]),
        dtype=st.sampled_from(list(DTYPES.values())),
        seed=st.integers(0, 99),
    )
    def test_any_combination(
        self,
        rows: int,
        tokens: int,
        context: int,
        groups: tuple[int, int],
        width: int,
        flags: tuple[bool, ...],
        mask: int | str | None,
        scale: float | None,
        dtype: torch.dtype,
        seed: int,
    ) -> None:
        case = AttentionCase(
            rows, tokens, context, groups[0] * groups[1], width, kv_heads=groups[0],
            context_index=flags[0], context_mask=flags[1], scale=scale, packed=flags[2],
            sums=flags[3], squares=flags[4], counts=flags[5],
            ring=dtype if flags[3] != flags[4] else None,
            capture_mask=max(rows, 1) if mask == "R" else mask,
        )  # fmt: skip
        args = case.make(dtype, seed)
        # Of a handful of numbers the root mean square is one rounding: plain torch may be lucky.
        ATTENTION.check(args, ATTENTION.run(args), times=4.0)

    def test_scores_far_apart(self) -> None:
        """Scores of hundreds overflow an exponential that does not subtract the largest."""
        args = AttentionCase(1, 3, 40, 1, 16, context_index=False).make(torch.float32)
        args["q"] *= 200.0
        got = ATTENTION.run(args)
        assert got["out"].isfinite().all()
        ATTENTION.check(args, got)


class TestLayout:
    @ATTENTION.every_backend
    @dtypes
    @pytest.mark.parametrize("offset", range(18))
    def test_offset_views_and_guards(self, offset: int, dtype: torch.dtype, backend: str) -> None:
        if DEVICE[backend] != "cpu":
            pytest.skip("guard bands are laid in host memory")
        args = AttentionCase(
            2, 9, 13, 2, 23, kv_heads=1, sums=True, squares=True, counts=True, ring=dtype,
            capture_mask=2, context_mask=True,
        ).make(dtype)  # fmt: skip
        names = (*CAPTURES, "q", "k_bank", "v_bank")
        ATTENTION.check_guarded(args, names, offset, backend=backend)

    @ATTENTION.every_backend
    def test_output_stays_inside(self, backend: str) -> None:
        if DEVICE[backend] != "cpu" or backend == "reference":
            pytest.skip("guard bands are laid in host memory, and torch minds its own")
        args = AttentionCase(2, 7, 5, 3, 9).make(torch.float32)
        out, whole = guarded(torch.zeros(2, 7, 3, 9), 3)
        rest = (args["q"], args["k_bank"], args["v_bank"], args["context_index"], *[None] * 8)
        torch.ops.sidechain.attention_tap.default(out, *rest)
        assert guards_intact(whole, out, 3)
        ATTENTION.check(args, {"out": out})

    @ATTENTION.every_backend
    @dtypes
    def test_strided_outer_dims(self, dtype: torch.dtype, backend: str) -> None:
        args = EVERYTHING.make(dtype, device=DEVICE[backend])
        ATTENTION.check_strided(args, backend=backend)

    def test_determinism_over_threads(self) -> None:
        args = AttentionCase(
            3, 700, 33, 2, 40, sums=True, squares=True, counts=True
        ).make(torch.float32)  # fmt: skip
        ATTENTION.check_threads(args)


class TestEdges:
    @ATTENTION.every_backend
    @dtypes
    def test_dead_rows_read_nothing(self, dtype: torch.dtype, backend: str) -> None:
        args = AttentionCase(
            4, 20, 40, 2, 16, context_mask=True, sums=True, counts=True, ring=dtype
        ).make(dtype, device=DEVICE[backend])
        args["context_index"].copy_(torch.tensor([-1, 3, 2, -(2**31)]))
        args["context_mask"][2] = False
        for name in ("q", "k_bank", "v_bank"):
            args[name].fill_(math.nan)
        got = ATTENTION.run(args, backend=backend)
        assert torch.equal(got["out"], torch.zeros_like(got["out"]))
        assert torch.equal(got["sums"], args["sums"])
        assert torch.equal(got["counts"][1], args["counts"][1] + 20)
        assert torch.equal(got["ring"][1], torch.zeros_like(got["ring"][1]))

    @ATTENTION.every_backend
    @dtypes
    def test_masked_context_is_not_read(self, dtype: torch.dtype, backend: str) -> None:
        args = AttentionCase(2, 20, 40, 2, 16, context_mask=True).make(
            dtype, device=DEVICE[backend]
        )
        expected = ATTENTION.run(args, backend=backend)["out"]
        for name in ("k_bank", "v_bank"):
            args[name][~args["context_mask"]] = math.nan
        assert torch.equal(ATTENTION.run(args, backend=backend)["out"], expected)
        assert expected.isfinite().all()

    @ATTENTION.every_backend
    @pytest.mark.parametrize("slot", [-1, 3, 2**40])
    def test_capture_slot_outside(self, slot: int, backend: str) -> None:
        args = EVERYTHING.make(torch.float16, device=DEVICE[backend])
        args["capture_slot"].fill_(slot)
        got = ATTENTION.run(args, backend=backend)
        for name in CAPTURES:
            assert torch.equal(got[name], args[name]), name

    @ATTENTION.every_backend
    @dtypes
    def test_not_finite_values(self, dtype: torch.dtype, backend: str) -> None:
        args = AttentionCase(2, 40, 33, 2, 20, sums=True, squares=True, capture_mask=1).make(
            dtype, device=DEVICE[backend]
        )
        args["q"][0, 3, 1, 5] = math.nan
        args["v_bank"][1, 4, 0, 7] = math.inf
        args["capture_mask"][0, 3] = False  # a masked NaN must not reach the sums
        got = ATTENTION.run(args, backend=backend)
        ATTENTION.check(args, got)
        assert got["out"][0, 3, 1].isnan().all()
        assert got["sums"][1, 0].isfinite().all()

    @dtypes
    def test_float64_is_served_by_the_reference(self, dtype: torch.dtype) -> None:
        args = upcast(AttentionCase(2, 6, 5, 2, 8, sums=True).make(dtype))
        got, expected = ATTENTION.run(args), ATTENTION.run(args, backend="reference")
        for name, value in expected.items():
            assert torch.equal(got[name], value)


class TestGradients:
    def test_reference(self) -> None:
        args = upcast(
            AttentionCase(3, 3, 4, 4, 3, kv_heads=2, context_mask=True).make(torch.float64)
        )
        leaves = [args.pop(k).requires_grad_() for k in ("q", "k_bank", "v_bank")]
        assert torch.autograd.gradcheck(lambda *values: reference.attend(*values, **args), leaves)

    def test_functional_form_writes_nothing(self) -> None:
        args = EVERYTHING.make(torch.float32)
        before = clone(args)
        out, captured = reference.attention_tap(**structured(args))
        inplace = ATTENTION.run(before, backend="reference")
        assert torch.equal(out, inplace["out"])
        for name in CAPTURES:
            assert torch.equal(args[name], before[name])
            assert torch.equal(getattr(captured, name), inplace[name])

    @pytest.mark.parametrize("name", ["q", "k_bank", "v_bank"])
    def test_refused(self, name: str) -> None:
        args = AttentionCase(1, 2, 3, 1, 4).make(torch.float32)
        args[name].requires_grad_()
        with pytest.raises(NotImplementedError, match=r"attention_tap\.attend is differentiable"):
            attention_tap(**args)
        with torch.no_grad():
            assert not attention_tap(**args).requires_grad

    def test_autograd_notices_the_write(self) -> None:
        w = torch.ones(4, requires_grad=True)
        args = AttentionCase(1, 2, 3, 1, 4, sums=True).make(torch.float32)
        loss = (args["sums"] * w).sum()
        ATTENTION.call(args)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="Inductor needs a C++ compiler on the CPU"
)
OPCHECK = [c for c in ATTENTION_CASES if c.what in ("plain", "gqa", "everything", "no-rows")]


class TestTorch:
    @dtypes
    @pytest.mark.parametrize("case", OPCHECK, ids=lambda c: c.name)
    def test_opcheck(self, case: AttentionCase, dtype: torch.dtype) -> None:
        args = case.make(dtype)
        ATTENTION.opcheck(args | {"out": torch.zeros(args["q"].shape, dtype=dtype)})

    @needs_compiler
    @pytest.mark.parametrize("backend", ["auto", "cpu"])
    def test_compile_fullgraph(self, backend: str) -> None:
        if backend == "cpu" and backends()["attention_tap"]["cpu"]:
            pytest.skip("attention_tap/cpu is not available")
        compiled = torch.compile(
            lambda **kw: attention_tap(**kw, backend=backend) * 2, fullgraph=True, dynamic=False
        )
        args = EVERYTHING.make(torch.float32)
        got = clone(args)
        doubled = compiled(**structured(got))
        ATTENTION.check(args, {"out": doubled / 2} | {name: got[name] for name in CAPTURES})

    @needs_compiler
    def test_changed_values_recompile_nothing(self) -> None:
        compiled = torch.compile(lambda **kw: attention_tap(**kw), fullgraph=True, dynamic=False)
        args = AttentionCase(2, 5, 6, 2, 8, context_mask=True, sums=True).make(torch.float32)
        compiled(**structured(clone(args)))
        with torch.compiler.set_stance("fail_on_recompile"):
            for n in range(-1, 4):
                args["context_index"].fill_(n)
                args["context_mask"][:, n] = False
                args["capture_slot"].fill_(n)
                got = clone(args)
                ATTENTION.check(args, {"out": compiled(**structured(got)), "sums": got["sums"]})


BAD = [
    ({"q": [1.0]}, TypeError, "expected q to be a tensor, got list"),
    ({"q": torch.zeros(2, 5, 8)}, ValueError, r"q of shape \[R, T, H, D\], got \[2, 5, 8\]"),
    ({"q": torch.zeros(2, 5, 4, 8).int()}, TypeError, "expected q of .*, got int32"),
    ({"q": torch.zeros(2, 5, 8, 4).mT}, ValueError, "expected q with a contiguous last dim"),
    ({"q": torch.zeros(2, 5, 4, 129)}, ValueError, "H >= 1 and 1 <= D <= 128"),
    ({"q": torch.zeros(2, 5, 4, 9)}, ValueError, r"k_bank of shape \[M, S, Hkv, 9\]"),
    ({"k_bank": None}, TypeError, "expected k_bank to be a tensor, got NoneType"),
    ({"k_bank": torch.zeros(3, 6, 2, 8).half()}, TypeError, "k_bank of float32, got float16"),
    ({"k_bank": torch.zeros(3, 6, 8, 2).mT}, ValueError, "k_bank with a contiguous last dim"),
    ({"k_bank": torch.zeros(3, 7, 2, 8)}, ValueError, r"v_bank of shape \[3, 7, 2, 8\]"),
    ({"v_bank": torch.zeros(3, 6, 8)}, ValueError, r"v_bank of shape \[M, S, Hkv, 8\]"),
    ({"k_bank": torch.zeros(0, 6, 2, 8), "v_bank": torch.zeros(0, 6, 2, 8)}, ValueError,
     "M >= 1 and S >= 1"),
    ({"k_bank": torch.zeros(3, 6, 3, 8), "v_bank": torch.zeros(3, 6, 3, 8)}, ValueError,
     "Hkv that divides H=4, got Hkv=3"),
    ({"context_index": torch.zeros(2).long()}, TypeError, "context_index of int32, got int64"),
    ({"context_index": torch.zeros(3).int()}, ValueError, r"context_index of shape \[2\]"),
    ({"context_mask": torch.ones(3, 5).bool()}, ValueError, r"context_mask of shape \[3, 6\]"),
    ({"context_mask": torch.ones(3, 6)}, TypeError, "context_mask of bool, got float32"),
    ({"scale": "big"}, TypeError, "expected scale to be a number, got str"),
    *capture_refusals(2, 5, 32),
]  # fmt: skip


class TestContract:
    @pytest.mark.parametrize("backend", ["auto", "reference"])
    @pytest.mark.parametrize(("change", "error", "match"), BAD, ids=[b[2][:40] for b in BAD])
    def test_bad_calls(
        self, change: dict[str, Any], error: type[Exception], match: str, backend: str
    ) -> None:
        args = AttentionCase(
            2, 5, 6, 4, 8, kv_heads=2, sums=True, squares=True, counts=True, ring=torch.float32,
        ).make(torch.float32)  # fmt: skip
        ATTENTION.check_refused(args, change, error, match, backend=backend)

    def test_backends(self) -> None:
        ATTENTION.check_backends(AttentionCase(1, 1, 1, 1, 1).make(torch.float32), "cuda")
