# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ops.harness import Harness, dtypes
from ops.support import DEVICE, upcast
from sidechain.ops import sae_edit_, sparse_decode
from sidechain.ops.sae_structs import edit_structs
from sidechain.reference.sae_edit import sae_edit
from sidechain.testing.cases import DTYPES, EDIT_CASES, EditCase, edit_call

every_case = pytest.mark.parametrize("case", EDIT_CASES, ids=lambda c: c.name)


def _call(args: dict[str, Any], **more: Any) -> dict[str, Tensor]:
    structs, keywords = edit_call(args)
    assert sae_edit_(*structs, **keywords, **more) is args["x"]
    return {"x": args["x"]}


EDIT = Harness("sae_edit_", _call)
every_backend = EDIT.every_backend


def bits(t: Tensor) -> Tensor:
    return t.view(torch.int32 if t.dtype == torch.float32 else torch.int16)


class TestNumerics:
    @every_backend
    @dtypes
    @every_case
    def test_against_float64(self, case: EditCase, dtype: torch.dtype, backend: str) -> None:
        args = case.make(dtype, device=DEVICE[backend])
        EDIT.check(args, EDIT.run(args, backend=backend))

    @every_case
    def test_reference_against_two_decodes(self, case: EditCase) -> None:
        """The edit is the difference of the decoded codes."""
        args = upcast(case.make(torch.float64))

        def decoded(name: str) -> Tensor | float:
            if args[name] is None:
                return 0.0
            codes = (args[name].contiguous(), args["indices"].contiguous())
            return sparse_decode(*codes, args["w_dec"], offsets=args["offsets"])

        change = decoded("values_new") - decoded("values_old")
        if args["strength"] is not None:
            change = change * args["strength"][:, None]
        if args["mask"] is not None:
            change = change * args["mask"][:, None]
        torch.testing.assert_close(
            EDIT.run(args, backend="reference")["x"], args["x"] + change, rtol=1e-10, atol=1e-10
        )

    @settings(max_examples=40, deadline=None)
    @given(
        rows=st.integers(1, 30),
        width=st.integers(8, 200),
        features=st.integers(1, 60),
        k=st.integers(0, 8),
        flags=st.tuples(*[st.booleans()] * 4),
        strength=st.sampled_from([None, 1, 0]),
        dtype=st.sampled_from(list(DTYPES.values())),
        seed=st.integers(0, 99),
    )
    def test_any_shape(
        self, rows: int, width: int, features: int, k: int, flags: tuple[bool, ...],
        strength: int | None, dtype: torch.dtype, seed: int,
    ) -> None:  # fmt: skip
        case = EditCase(
            rows, width, features, min(k, features), csr=flags[0], old=flags[1], mask=flags[2],
            shared=flags[3] and not flags[0], strength=rows if strength == 0 else strength,
        )  # fmt: skip
        args = case.make(dtype, seed)
        EDIT.check(args, EDIT.run(args))


class TestEdges:
    @every_backend
    @dtypes
    @pytest.mark.parametrize(
        "change",
        [
            {"strength": torch.zeros(1)},
            {"strength": torch.zeros(21)},
            {"mask": torch.zeros(21, dtype=torch.bool)},
            {"values_new": "values_old"},
            {"indices": torch.full((21, 6), -1, dtype=torch.int32)},
            {"indices": torch.full((21, 6), 150, dtype=torch.int32)},
            {"strength": torch.zeros(1), "values_new": torch.full((21, 6), math.inf)},
        ],
        ids=["strength0", "strengths0", "masked", "same", "index-1", "index150", "0inf"],
    )
    def test_no_change_is_bit_identical(
        self, change: dict[str, Any], dtype: torch.dtype, backend: str
    ) -> None:
        args = EditCase(21, 96, 150, 6).make(dtype, device=DEVICE[backend])
        x = args["x"]
        x[0, 0], x[0, 1], x[1, 2], x[2, 4] = math.nan, -0.0, math.inf, -math.inf
        args |= {k: args[v] if isinstance(v, str) else v.to(x.device) for k, v in change.items()}
        assert torch.equal(bits(EDIT.run(args, backend=backend)["x"]), bits(x))

    @every_backend
    @dtypes
    def test_only_edited_rows_change(self, dtype: torch.dtype, backend: str) -> None:
        args = EditCase(6, 40, 50, 3, old=False).make(dtype, device=DEVICE[backend])
        args["values_new"][2] = 0.0
        args["mask"] = torch.tensor([1, 1, 1, 0, 1, 1], device=args["x"].device).bool()
        changed = (EDIT.run(args, backend=backend)["x"] != args["x"]).any(1)
        assert changed.tolist() == [True, True, False, False, True, True]

    @every_backend
    def test_rest_of_x_survives(self, backend: str) -> None:
        """What lies across the edited directions is left alone."""
        args = EditCase(30, 64, 20, 2).make(torch.float32, device=DEVICE[backend])
        change = EDIT.run(args, backend=backend)["x"] - args["x"]
        for n in range(30):
            used = args["indices"][n][args["indices"][n] >= 0].long()
            rows = args["w_dec"][used].double()
            solved = torch.linalg.lstsq(rows.T, change[n].double()).solution
            torch.testing.assert_close(solved @ rows, change[n].double(), rtol=1e-4, atol=1e-5)


class TestLayout:
    @every_backend
    @dtypes
    @pytest.mark.parametrize("offset", range(0, 18, 3))
    def test_offset_views_and_guards(self, offset: int, dtype: torch.dtype, backend: str) -> None:
        if DEVICE[backend] != "cpu":
            pytest.skip("guard bands are laid in host memory")
        args = EditCase(5, 23, 30, 4, strength=5).make(dtype)
        names = ("x", "values_old", "values_new", "w_dec", "strength")
        EDIT.check_guarded(args, names, offset, backend=backend)

    @every_backend
    @dtypes
    def test_strided_rows(self, dtype: torch.dtype, backend: str) -> None:
        args = EditCase(7, 40, 30, 5, strength=7, mask=True).make(dtype, device=DEVICE[backend])
        want = EDIT.run(args, backend=backend)["x"]
        for name in ("x", "values_old", "values_new", "indices", "w_dec"):
            t = args[name]
            whole = t.new_zeros(2 * t.shape[0], t.shape[1] + 3)
            args[name] = whole[::2, 1 : 1 + t.shape[1]].copy_(t)
        EDIT.call(args, backend=backend)
        assert torch.equal(args["x"], want)

    def test_determinism_over_threads(self) -> None:
        EDIT.check_threads(EditCase(500, 300, 80, 6).make(torch.bfloat16))


class TestGradients:
    @pytest.mark.parametrize("csr", [False, True], ids=["topk", "csr"])
    def test_functional_form(self, csr: bool) -> None:
        args = upcast(EditCase(3, 4, 6, 2, csr=csr, strength=3).make(torch.float64))
        wanted = ("x", "values_old", "values_new", "w_dec", "strength")
        leaves = [args[k].requires_grad_() for k in wanted]

        def edited(*t: Tensor) -> Tensor:
            given = args | dict(zip(wanted, t, strict=True))
            return sae_edit(*edit_structs([*given.values()]))

        assert torch.autograd.gradcheck(edited, leaves)

    @pytest.mark.parametrize("name", ["x", "values_old", "values_new", "w_dec", "strength"])
    def test_refused_in_place(self, name: str) -> None:
        args = EditCase(3, 4, 6, 2, strength=3).make(torch.float32)
        args[name].requires_grad_()
        with pytest.raises(NotImplementedError, match=r"sae_edit\.sae_edit is differentiable"):
            EDIT.call(args)
        with torch.no_grad():
            EDIT.call(args)

    def test_autograd_notices_the_write(self) -> None:
        args = EDIT_CASES[0].make(torch.float32)
        loss = (args["x"] * torch.ones(1, requires_grad=True)).sum()
        EDIT.call(args)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


class TestTorch:
    @dtypes
    @pytest.mark.parametrize("case", EDIT_CASES[:3], ids=lambda c: c.name)
    def test_opcheck(self, case: EditCase, dtype: torch.dtype) -> None:
        EDIT.opcheck(case.make(dtype))


BAD = [
    ({"x": None}, TypeError, "expected x to be a tensor, got NoneType"),
    ({"x": torch.zeros(3)}, ValueError, r"x of shape \[N, d\] .*got \[3\]"),
    ({"x": torch.zeros(1, 4).expand(3, 4)}, ValueError, "x without repeated"),
    ({"x": torch.zeros(4, 3).mT}, ValueError, "x with a contiguous last dim"),
    ({"w_dec": torch.zeros(6, 5)}, ValueError, r"w_dec of shape \[F, 4\] \(d of x\)"),
    ({"w_dec": torch.zeros(6, 4).int()}, TypeError, "expected w_dec of .*, got int32"),
    ({"indices": torch.zeros(2, 2).int()}, ValueError, r"indices of shape \[3, K\]"),
    ({"indices": torch.zeros(3, 2).long()}, TypeError, "indices of int32, got int64"),
    ({"values_old": torch.zeros(3, 3)}, ValueError, r"values_old of shape \[3, 2\]"),
    ({"values_new": torch.zeros(3, 2).half()}, TypeError, "values_new of float32, got float16"),
    ({"values_old": None, "values_new": None}, ValueError, "values_old or values_new, got neither"),
    ({"strength": torch.zeros(2)}, ValueError, r"strength of shape \[3\] \(1 or N of x\)"),
    ({"strength": 1.0}, TypeError, "expected strength to be a tensor, got float"),
    ({"mask": torch.zeros(3)}, TypeError, "mask of bool, got float32"),
    ({"mask": torch.zeros(4).bool()}, ValueError, r"mask of shape \[3\]"),
    ({"offsets": torch.zeros(4).long()}, ValueError, r"indices of shape \[nnz\] \(CSR\)"),
]


class TestContract:
    @pytest.mark.parametrize("backend", ["auto", "reference"])
    @pytest.mark.parametrize(("change", "error", "match"), BAD, ids=[b[2][:40] for b in BAD])
    def test_bad_calls(
        self, change: dict[str, Any], error: type[Exception], match: str, backend: str
    ) -> None:
        args = EditCase(3, 4, 6, 2, strength=3).make(torch.float32)
        EDIT.check_refused(args, change, error, match, backend=backend)

    def test_structs(self) -> None:
        (x, edit, w_dec), _ = edit_call(EDIT_CASES[0].make(torch.float32))
        with pytest.raises(TypeError, match=r"^sae_edit_: expected edit to be CodeEdit, got tuple"):
            sae_edit_(x, tuple(edit), w_dec)
