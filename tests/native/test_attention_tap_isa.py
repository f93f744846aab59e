# SPDX-License-Identifier: Apache-2.0
"""attention_tap on every instruction set this machine has, through the NumPy entry points."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ops.support import clone, upcast
from sidechain import _native
from sidechain.ops import attention_tap
from sidechain.testing.cases import ATTENTION_CASES, DTYPES, AttentionCase, structured
from sidechain.testing.tolerance import assert_close

host: Any = _native.host()
pytestmark = pytest.mark.skipif(host is None, reason=f"_host: {_native.absent('_host')}")
ISAS = host.isas() if host else []
HELD = ("sums", "squares", "counts")


def array(t: Tensor) -> np.ndarray:
    """Contiguous copy; half types as uint16."""
    t = t.contiguous().clone()
    return t.view(torch.int16).numpy().view(np.uint16) if t.element_size() == 2 else t.numpy()


def on_isa(args: dict[str, Any], isa: str) -> dict[str, Tensor]:
    """Run args, whose capture slot is 1, on an ISA and return the outputs."""
    q = args["q"]
    kw: dict[str, Any] = {"scale": args.get("scale", q.shape[-1] ** -0.5), "isa": isa}
    kw |= {n: array(args[n]) for n in ("context_index", "context_mask") if n in args}
    kw |= {n: array(args[n][1]) for n in HELD if n in args}
    if "capture_mask" in args:
        kw["capture_mask"] = array(args["capture_mask"].expand(q.shape[:2]))
    bank = array(args["k_bank"]), array(args["v_bank"])
    out = host.attention_tap(array(q), *bank, dtype=str(q.dtype).removeprefix("torch."), **kw)
    out = torch.from_numpy(out.view(np.int16) if out.dtype == np.uint16 else out).view(q.dtype)
    return {"out": out} | {n: torch.from_numpy(kw[n]) for n in HELD if n in kw}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("case", ATTENTION_CASES, ids=lambda c: c.name)
def test_parity(case: AttentionCase, dtype: torch.dtype, isa: str) -> None:
    args = case.make(dtype)
    got = on_isa(args, isa)
    exact, eager = upcast(args), clone(args)
    exact["out"] = attention_tap(**structured(exact), backend="reference")
    eager["out"] = attention_tap(**structured(eager), backend="reference")
    for name, value in got.items():
        pick = slice(None) if name == "out" else 1
        assert_close(f"{isa} {name}", value, exact[name][pick], eager[name][pick])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"isa": "avx9"}, "attention_tap: expected an ISA this machine supports, got avx9"),
        ({"dtype": "float16"}, "attention_tap: unexpected layout of q"),
        ({"sums": np.zeros(3, np.float32)}, "attention_tap: unexpected size of sums"),
    ],
)
def test_bad_calls(change: dict[str, Any], match: str) -> None:
    q, bank = np.zeros((2, 3, 2, 4), np.float32), np.zeros((1, 5, 2, 4), np.float32)
    with pytest.raises(ValueError, match=match):
        host.attention_tap(q, bank, bank, **({"isa": "baseline", "scale": 1.0} | change))
