# SPDX-License-Identifier: Apache-2.0
"""The ops on sparse codes on every instruction set this machine has."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ops.sae_update_calls import STATE, UPDATE
from ops.support import upcast
from ops.test_sae_edit import EDIT
from sidechain import _native
from sidechain.ops import CodeSums, code_sums_, sparse_decode_loss
from sidechain.testing.cases import DTYPES, DecodeCase, EditCase, SumsCase, UpdateCase
from sidechain.testing.tolerance import assert_close

host: Any = _native.host()
pytestmark = pytest.mark.skipif(host is None, reason=f"_host: {_native.absent('_host')}")
ISAS = host.isas() if host else []
every_isa = pytest.mark.parametrize("isa", ISAS)
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())


def array(t: Tensor) -> np.ndarray:
    """Contiguous copy; half types as uint16."""
    t = t.contiguous().clone()
    return t.view(torch.int16).numpy().view(np.uint16) if t.element_size() == 2 else t.numpy()


def tensor(a: np.ndarray, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(a.view(np.int16) if a.dtype == np.uint16 else a).view(dtype)


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@every_isa
@dtypes
@pytest.mark.parametrize("width", [8, 33, 320, 1000])
def test_sparse_decode_loss(width: int, dtype: torch.dtype, isa: str) -> None:
    args = DecodeCase(31, width, 300, 9).make(dtype)
    got = host.sparse_decode_loss(
        *(array(args[k]) for k in ("values", "indices", "w_dec", "b_dec", "target")),
        dtype=name(dtype), isa=isa,
    )  # fmt: skip
    exact, eager = (
        sparse_decode_loss(**upcast(args)),
        sparse_decode_loss(**args, backend="reference"),
    )
    for field, g, x, e in zip(exact._fields, got, exact, eager, strict=True):
        assert_close(f"{isa} {field}", torch.from_numpy(g), x, e)


@every_isa
@pytest.mark.parametrize("half", [False, True], ids=["f32", "bf16"])
@pytest.mark.parametrize("widths", [(8, 33), (100, 64), (513, 1000)], ids=str)
def test_sae_update(widths: tuple[int, int], half: bool, isa: str) -> None:
    case = UpdateCase(
        40, *widths, 60, 5, half_state=half, clip=True, weight_decay=0.01, extras=True
    )  # fmt: skip
    args = case.make(torch.float32) | {"last_fired": None}
    exact, eager = UPDATE.run(upcast(args)), UPDATE.run(args, backend="reference")
    out = {k: array(args[k]) for k in ("w_enc", "w_dec", "b_enc", *STATE, "b_pre_grad")}
    total = host.sae_update(
        out["w_enc"], out["w_dec"], out["b_enc"], [out[k] for k in STATE],
        dtype=name(args["enc_mean"].dtype), x=array(args["x"]), b_pre=array(args["b_pre"]),
        **{k: array(args[k][0]) for k in ("values", "indices", "dvalues", "error")},
        lr=float(args["lr"]), step=int(args["step"]), clip_scale=float(args["clip_scale"]),
        weight_decay=args["weight_decay"], b_pre_grad=out["b_pre_grad"], isa=isa,
    )  # fmt: skip
    for key, value in out.items():
        assert_close(f"{isa} {key}", tensor(value, args[key].dtype), exact[key], eager[key])
    assert_close(f"{isa} square", torch.tensor([total]), exact["square"], eager["square"])


@every_isa
@dtypes
@pytest.mark.parametrize("width", [8, 33, 320, 1000])
def test_sae_edit(width: int, dtype: torch.dtype, isa: str) -> None:
    args = EditCase(31, width, 300, 5, strength=31).make(dtype)
    x = array(args["x"])
    order = ("values_old", "values_new", "indices", "w_dec", "strength")
    host.sae_edit(x, *(array(args[k]) for k in order), dtype=name(dtype), isa=isa)
    exact, eager = EDIT.run(upcast(args)), EDIT.run(args, backend="reference")
    assert_close(f"{isa} x", tensor(x, dtype), exact["x"], eager["x"])


@every_isa
def test_code_sums(isa: str) -> None:
    args = SumsCase(200, 40, 8, labels=4, label=True).make()
    out = {k: array(args[k]) for k in CodeSums._fields}
    codes = (array(args[k]) for k in ("values", "indices", "label"))
    host.code_sums(*codes, *out.values(), isa=isa)
    want = CodeSums(*(args[k].clone() for k in CodeSums._fields))
    code_sums_(want, args["values"], args["indices"], label=args["label"], backend="reference")
    for field, value in zip(CodeSums._fields, want, strict=True):
        torch.testing.assert_close(torch.from_numpy(out[field]), value)


VALUES, INDICES = np.zeros((3, 2), np.float32), np.zeros((3, 2), np.int32)
TABLE = np.zeros((5, 4), np.float32)
BAD = {
    "decode": ("sparse_decode_loss", (VALUES[0], INDICES, TABLE, TABLE[0], TABLE[:3])),
    "layout": ("sparse_decode_loss", (VALUES, INDICES, TABLE, TABLE[0], TABLE[:2])),
    "edit": ("sae_edit", (TABLE[:3], VALUES, VALUES, INDICES[:1], TABLE, VALUES[0])),
    "sums": ("code_sums", (VALUES, INDICES, np.zeros(2, np.int64), TABLE, TABLE,
                           np.zeros((5, 4), np.int64), np.zeros(5, np.int64))),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_calls(what: str) -> None:
    function, args = BAD[what]
    with pytest.raises(ValueError, match=r"expected|unexpected layout of target"):
        getattr(host, function)(*args, isa="baseline")
