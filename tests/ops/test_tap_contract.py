# SPDX-License-Identifier: Apache-2.0
"""`tap_`: edges, gradients, torch's own checks, bad calls."""

from __future__ import annotations

import math
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor

from ops.harness import CAPTURES, capture_refusals, dtypes
from ops.support import DEVICE, clone, upcast
from ops.tap_calls import TAP
from sidechain.ops import Steering, backends, tap_
from sidechain.reference import tap as reference
from sidechain.testing.cases import TAP_CASES, TapCase, structured


class TestEdges:
    @TAP.every_backend
    @dtypes
    @pytest.mark.parametrize(
        "change",
        [
            {"strength": torch.zeros(2)},
            {"steer_slot": torch.tensor([-1])},
            {"steer_slot": torch.tensor([4])},
            {"index": torch.tensor([-1, -1], dtype=torch.int32)},
            {"index": torch.tensor([3, 99], dtype=torch.int32)},
            {"steer_mask": torch.zeros(1, 33, dtype=torch.bool)},
            {"strength": torch.zeros(2), "removal": torch.zeros(2)},
        ],
        ids=["strength0", "slot-1", "slot4", "index-1", "index99", "masked", "removal0"],
    )
    def test_untouched_is_bit_identical(
        self, change: dict[str, Tensor], dtype: torch.dtype, backend: str
    ) -> None:
        args = TapCase(2, 33, 40, renorm=True).make(dtype, device=DEVICE[backend])
        x = args["x"]
        x[0, 0, 0], x[0, 0, 1], x[1, 2, 3], x[1, 2, 4] = math.nan, -0.0, math.inf, -math.inf
        args.update({k: v.to(x.device) for k, v in change.items()})
        got = TAP.run(args, backend=backend)["x"]
        bits = torch.int32 if dtype == torch.float32 else torch.int16
        assert torch.equal(got.view(bits), x.view(bits))

    @TAP.every_backend
    def test_only_chosen_rows_and_tokens_change(self, backend: str) -> None:
        args = TapCase(3, 20, 24, steer_mask=3).make(torch.float32, device=DEVICE[backend])
        args["strength"][1] = 0.0
        got = TAP.run(args, backend=backend)["x"]
        changed = (got != args["x"]).any(-1)
        expected = args["steer_mask"].clone()
        expected[1] = False
        assert torch.equal(changed, expected)

    @TAP.every_backend
    @pytest.mark.parametrize("slot", [-1, 4, 2**40])
    def test_capture_slot_outside(self, slot: int, backend: str) -> None:
        args = TapCase(
            2, 9, 12, strength=False, sums=True, squares=True, counts=True, ring=torch.float16
        ).make(torch.float32, device=DEVICE[backend])
        args["capture_slot"].fill_(slot)
        got = TAP.run(args, backend=backend)
        for name, value in got.items():
            assert torch.equal(value, args[name]), name

    @TAP.every_backend
    def test_capture_reads_before_steering(self, backend: str) -> None:
        args = TapCase(2, 9, 12, sums=True, ring=torch.float32).make(
            torch.float32, device=DEVICE[backend]
        )
        got = TAP.run(args, backend=backend)
        assert torch.equal(got["ring"][1], args["x"])
        assert not torch.equal(got["x"], args["x"])

    @TAP.every_backend
    @dtypes
    def test_renorm_of_zero(self, dtype: torch.dtype, backend: str) -> None:
        device = DEVICE[backend]
        v = torch.zeros(1, 1, 8, device=device)
        v[..., 0] = 2.0
        x = torch.zeros(1, 3, 8, dtype=dtype, device=device)
        x[0, 0, 0] = -4.0  # y = 0 exactly: stays 0
        x[0, 1] = 0.0  # x = 0: norm 0 is kept
        x[0, 2, 0] = 1.0
        args = {
            "x": x,
            "vectors": v,
            "strength": torch.tensor([2.0], device=device),
            "renorm": True,
        }
        got = TAP.run(args, backend=backend)["x"]
        assert torch.equal(got[0, :2], torch.zeros(2, 8, dtype=dtype, device=device))
        assert got[0, 2].tolist() == [1.0] + [0.0] * 7

    @TAP.every_backend
    @dtypes
    @pytest.mark.parametrize("renorm", [False, True], ids=["plain", "renorm"])
    @pytest.mark.parametrize("removal", [False, True], ids=["add", "remove"])
    def test_not_finite_values(
        self, removal: bool, renorm: bool, dtype: torch.dtype, backend: str
    ) -> None:
        args = TapCase(
            1, 40, 33, removal=removal, renorm=renorm, sums=True, squares=True, capture_mask=1
        ).make(dtype, device=DEVICE[backend])
        args["x"][0, 3, 1], args["x"][0, 7, 32] = math.nan, math.inf
        args["capture_mask"][0, 3] = False  # a masked NaN must not reach the sums
        args["capture_mask"][0, 7] = True
        got = TAP.run(args, backend=backend)
        assert not got["sums"].isnan().any()
        TAP.check(args, got)

    def test_huge_removal_of_infinite_projection(self) -> None:
        x = torch.full((2, 1, 4), math.inf)
        v = torch.ones(1, 1, 4)
        removal = torch.tensor([0.0, 1.0])
        got = TAP.run({"x": x, "vectors": v, "strength": torch.ones(2), "removal": removal})["x"]
        assert got[0].isinf().all()
        assert got[1].isnan().all()

    @dtypes
    def test_float64_is_served_by_the_reference(self, dtype: torch.dtype) -> None:
        args = upcast(TapCase(2, 6, 5, renorm=True, sums=True).make(dtype))
        got, expected = TAP.run(args), TAP.run(args, backend="reference")
        assert torch.equal(got["x"], expected["x"])
        assert torch.equal(got["sums"], expected["sums"])

    @TAP.every_backend
    @pytest.mark.parametrize("tokens", [3, 300])
    @pytest.mark.parametrize("short", ["sums", "squares", "counts", "ring"])
    def test_buffers_of_different_length(self, short: str, tokens: int, backend: str) -> None:
        args = TapCase(
            1, tokens, 16, strength=False, sums=True, squares=True, counts=True, ring=torch.float32
        ).make(torch.float32, device=DEVICE[backend])
        args[short] = args[short][:1].clone()  # slot 1 lies outside this one only
        got = TAP.run(args, backend=backend)
        TAP.check(args, got)
        for name in CAPTURES:
            assert torch.equal(got[name], args[name]) == (name == short), name


def _rows_apart(args: dict[str, Any]) -> None:
    """Rows 1 and 3 stay, row 2 holds a NaN and row 0 an infinity."""
    args["strength"][1] = args["removal"][1] = 0.0
    args["index"][3] = -1
    args["x"][2, 5, 3], args["x"][0, 9, 70] = math.nan, math.inf


def _masked_groups(args: dict[str, Any]) -> None:
    """Whole groups of tokens, the end of a row, and a whole row are masked."""
    args["steer_mask"][:, 4:21] = False
    args["steer_mask"][0] = False
    args["capture_mask"][:, 8:31] = False
    args["capture_mask"][1, 8:] = False
    args["capture_mask"][3] = False


def _scattered(args: dict[str, Any]) -> None:
    """Single tokens far apart, other ones for the two masks."""
    for name, first in (("steer_mask", 1), ("capture_mask", 0)):
        args[name].fill_(False)
        args[name][:, first::9] = True


def _nowhere(args: dict[str, Any]) -> None:
    """Steers only."""
    args["capture_slot"].fill_(-1)


def _not_steered(args: dict[str, Any]) -> None:
    """Captures only."""
    args["steer_slot"].fill_(4)


CHANGES = (_rows_apart, _masked_groups, _scattered, _nowhere, _not_steered)


class TestMixedRows:
    @TAP.every_backend
    @dtypes
    @pytest.mark.parametrize("tokens", [37, 160], ids="T{}".format)
    @pytest.mark.parametrize("case", CHANGES, ids=lambda f: f.__name__.strip("_"))
    def test_against_float64(
        self, case: Any, tokens: int, dtype: torch.dtype, backend: str
    ) -> None:
        args = TapCase(
            4, tokens, 72, removal=True, renorm=True, index=True, steer_mask=4, sums=True,
            squares=True, counts=True, ring=torch.float32, capture_mask=4,
        ).make(dtype, device=DEVICE[backend])  # fmt: skip
        args["index"].copy_(torch.tensor([0, 1, 2, 2]))
        case(args)
        got = TAP.run(args, backend=backend)
        TAP.check(args, got)
        if case is _rows_apart:
            assert torch.equal(got["x"][1::2], args["x"][1::2])
            assert int(got["x"].isnan().any(-1).sum()) <= 2  # of one token each


class TestGradients:
    def test_functional_form(self) -> None:
        args = upcast(
            TapCase(2, 3, 5, removal=True, renorm=True, index=True, steer_mask=2).make(
                torch.float64
            )
        )
        args["index"] = torch.tensor([1, -1], dtype=torch.int32)
        wanted = ("x", "vectors", "strength", "removal")
        leaves = [args.pop(k).requires_grad_() for k in wanted]

        def call(*values: Tensor) -> Tensor:
            return reference.tap(**structured(args | dict(zip(wanted, values, strict=True))))[0]

        assert torch.autograd.gradcheck(call, leaves)

    def test_functional_form_writes_nothing(self) -> None:
        args = TAP_CASES[10].make(torch.float32)
        before = clone(args)
        y, captured = reference.tap(**structured(args))
        for name, value in TAP.run(before, backend="reference").items():
            assert torch.equal(args[name], before[name])
            assert torch.equal(y if name == "x" else getattr(captured, name), value)

    def test_gradient_at_zero_norm_is_finite(self) -> None:
        x = torch.zeros(1, 1, 4, requires_grad=True)
        steering = Steering(torch.ones(1, 1, 4), strength=torch.ones(1), renorm=True)
        y, _ = reference.tap(x, steering=steering)
        y.sum().backward()
        assert x.grad is not None
        assert x.grad.isfinite().all()

    @pytest.mark.parametrize("name", ["x", "vectors", "strength"])
    def test_refused_in_place(self, name: str) -> None:
        args = TapCase(1, 2, 3).make(torch.float32)
        args[name].requires_grad_()
        with pytest.raises(NotImplementedError, match=r"reference\.tap\.tap is differentiable"):
            TAP.call(args)
        with torch.no_grad():
            TAP.call(args)

    def test_autograd_notices_the_write(self) -> None:
        w = torch.ones(3, requires_grad=True)
        args = TapCase(1, 2, 3).make(torch.float32)
        loss = (args["x"] * w).sum()
        TAP.call(args)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    def test_inference_mode(self) -> None:
        with torch.inference_mode():
            args = TapCase(1, 2, 3, sums=True).make(torch.float32)
            TAP.call(args)
        TAP.call(args | {"x": torch.randn(1, 2, 3), "sums": torch.zeros(2, 1, 3)})


needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="Inductor needs a C++ compiler on the CPU"
)
OPCHECK = [c for c in TAP_CASES if c.what in ("steer", "masked-moments", "everything", "no-rows")]


class TestTorch:
    @dtypes
    @pytest.mark.parametrize("case", OPCHECK, ids=lambda c: c.name)
    def test_opcheck(self, case: TapCase, dtype: torch.dtype) -> None:
        TAP.opcheck(case.make(dtype))

    @needs_compiler
    @pytest.mark.parametrize("backend", ["auto", "cpu"])
    def test_compile_fullgraph(self, backend: str) -> None:
        if backend == "cpu" and backends()["tap_"]["cpu"]:
            pytest.skip("tap_/cpu is not available")
        compiled = torch.compile(
            lambda **kw: tap_(**kw, backend=backend) * 2, fullgraph=True, dynamic=False
        )
        args = TAP_CASES[10].make(torch.float32)
        got = clone(args)
        doubled = compiled(**structured(got))
        TAP.check(args, got)
        assert torch.equal(doubled, got["x"] * 2)

    @needs_compiler
    def test_changed_values_recompile_nothing(self) -> None:
        compiled = torch.compile(lambda **kw: tap_(**kw), fullgraph=True, dynamic=False)
        args = TapCase(2, 5, 8, sums=True).make(torch.float32)
        compiled(**structured(clone(args)))
        with torch.compiler.set_stance("fail_on_recompile"):
            for slot in range(-1, 4):
                args["strength"].mul_(2.0)
                args["steer_slot"].fill_(slot)
                args["capture_slot"].fill_(slot)
                got = clone(args)
                compiled(**structured(got))
                TAP.check(args, got)


BAD = [
    ({"x": [1.0]}, TypeError, "expected x to be a tensor, got list"),
    ({"x": torch.zeros(2, 3)}, ValueError, r"expected x of shape \[R, T, C\], got \[2, 3\]"),
    ({"x": torch.zeros(2, 5, 8, dtype=torch.int32)}, TypeError, "expected x of .*, got int32"),
    ({"x": torch.zeros(2, 8, 5).mT}, ValueError, "expected x with a contiguous last dim"),
    ({"vectors": torch.zeros(3, 4, 9)}, ValueError, r"vectors of shape \[V, S, 8\] .*\[3, 4, 9\]"),
    ({"vectors": torch.zeros(4, 8)}, ValueError, r"expected steering\.vectors of shape"),
    ({"vectors": torch.zeros(0, 4, 8)}, ValueError, r"steering\.vectors with V >= 1 and S >= 1"),
    ({"vectors": torch.zeros(3, 4, 8).half()}, TypeError, "vectors of float32, got float16"),
    ({"vectors": torch.zeros(3, 8, 4).mT}, ValueError, "vectors with a contiguous last dim"),
    ({"vectors": None}, TypeError, r"steering\.vectors to be a tensor, got NoneType"),
    ({"strength": None}, ValueError, "expected strength or removal in steering, got neither"),
    ({"strength": 2.0}, TypeError, r"expected steering\.strength to be a tensor, got float"),
    ({"strength": torch.ones(3)}, ValueError, r"strength of shape \[2\] \(R=x.size\(0\)\)"),
    ({"removal": torch.ones(2, 1)}, ValueError, r"steering\.removal of shape \[2\]"),
    ({"index": torch.zeros(2, dtype=torch.int64)}, TypeError, "index of int32, got int64"),
    ({"steer_slot": torch.tensor(1)}, ValueError, r"steering\.slot of shape \[1\]"),
    ({"steer_slot": torch.zeros(1, dtype=torch.int32)}, TypeError, r"steering\.slot of int64"),
    ({"steer_mask": torch.ones(2, 4).bool()}, ValueError, r"steering\.mask of shape \[2, 5\]"),
    ({"steer_mask": torch.ones(2, 5)}, TypeError, r"steering\.mask of bool, got float32"),
    ({"steer_slot": torch.zeros(1, device="meta").long()}, RuntimeError, r"slot on cpu"),
    *capture_refusals(2, 5, 8),
]


class TestContract:
    @pytest.mark.parametrize("backend", ["auto", "reference"])
    @pytest.mark.parametrize(("change", "error", "match"), BAD, ids=[b[2][:40] for b in BAD])
    def test_bad_calls(
        self, change: dict[str, Any], error: type[Exception], match: str, backend: str
    ) -> None:
        args = TapCase(
            2, 5, 8, sums=True, squares=True, counts=True, ring=torch.float32
        ).make(torch.float32)  # fmt: skip
        TAP.check_refused(args, change, error, match, backend=backend)

    @pytest.mark.parametrize("name", ["capture", "steering"])
    def test_structs(self, name: str) -> None:
        wanted = f"expected {name} to be a {name.title()} or None, got dict"
        with pytest.raises(TypeError, match=wanted):
            tap_(torch.zeros(1, 1, 1), **{name: {}})

    def test_backends(self) -> None:
        TAP.check_backends(TapCase(1, 1, 1).make(torch.float32), "triton")
