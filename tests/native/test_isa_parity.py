# SPDX-License-Identifier: Apache-2.0
"""Every instruction set this machine has, through the NumPy entry points of ``_host``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ops.support import upcast
from sidechain import _native
from sidechain.ops import tap_
from sidechain.testing.cases import DTYPES, TAP_CASES, TapCase, structured
from sidechain.testing.tolerance import assert_close

host: Any = _native.host()
pytestmark = pytest.mark.skipif(host is None, reason=f"_host: {_native.absent('_host')}")
ISAS = host.isas() if host else []
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())


def array(t: Tensor) -> np.ndarray:
    """Contiguous copy; half types as uint16."""
    t = t.contiguous().clone()
    return t.view(torch.int16).numpy().view(np.uint16) if t.element_size() == 2 else t.numpy()


def tensor(a: np.ndarray, dtype: torch.dtype) -> Tensor:
    t = torch.from_numpy(a.view(np.int16) if a.dtype == np.uint16 else a)
    return t.view(dtype)


def on_isa(args: dict[str, Any], isa: str) -> dict[str, Tensor]:
    """Run args, which use one slot and one vector, on an ISA and return the outputs."""
    x = args["x"]
    kw: dict[str, Any] = {"dtype": str(x.dtype).removeprefix("torch."), "isa": isa}
    for name in ("strength", "removal"):
        if name in args:
            kw[name] = array(args[name])
    if "vectors" in args:
        kw["vector"] = array(args["vectors"][0, 2])
    for name in ("steer_mask", "capture_mask"):
        if name in args:
            kw[name] = array(args[name].expand(x.shape[:2]))
    slot = 1
    out: dict[str, Any] = {"x": array(x)}
    for name in ("sums", "squares", "counts", "ring"):
        if name in args:
            out[name] = kw[name] = array(args[name][slot])
    if "ring" in args:
        kw["ring_dtype"] = str(args["ring"].dtype).removeprefix("torch.")
    host.tap(out["x"], renorm=args.get("renorm", False), **kw)
    return {k: tensor(v, args[k].dtype) for k, v in out.items()}


@pytest.mark.parametrize("isa", ISAS)
@dtypes
@pytest.mark.parametrize(
    "case", [c for c in TAP_CASES if not c.index or c.what == "everything"], ids=lambda c: c.name
)
def test_parity(case: TapCase, dtype: torch.dtype, isa: str) -> None:
    args = case.make(dtype)
    args.pop("index", None)
    got = on_isa(args, isa)
    exact, eager = upcast(args), {k: v.clone() if isinstance(v, Tensor) else v
                                  for k, v in args.items()}  # fmt: skip
    tap_(**structured(exact), backend="reference")
    tap_(**structured(eager), backend="reference")
    for name, value in got.items():
        pick = slice(None) if name == "x" else 1
        assert_close(f"{isa} {name}", value, exact[name][pick], eager[name][pick])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["f16", "bf16"])
def test_every_bit_pattern_converts_as_torch_does(dtype: torch.dtype, isa: str) -> None:
    x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).view(1, 1, -1)
    ring = np.zeros((1, 1, 65536), np.float32)
    host.tap(array(x), dtype=str(dtype).removeprefix("torch."), isa=isa, ring=ring)
    torch.testing.assert_close(torch.from_numpy(ring), x.float(), rtol=0, atol=0, equal_nan=True)

    # And back, from float32 values on, between and beyond the representable ones.
    bits = torch.randint(-(2**31), 2**31 - 1, (1, 1, 200_000), dtype=torch.int64).to(torch.int32)
    near = x.float()[x.isfinite()].view(1, 1, -1)
    wide = torch.cat([bits.view(torch.float32), near * (1 + 2**-9), near * (1 + 2**-12)], -1)
    narrow = np.zeros(wide.shape, np.uint16)
    host.tap(array(wide), isa=isa, ring=narrow, ring_dtype=str(dtype).removeprefix("torch."))
    torch.testing.assert_close(
        tensor(narrow, dtype), wide.to(dtype), rtol=0, atol=0, equal_nan=True
    )


def test_isa_list_matches_the_processor() -> None:
    assert ISAS[0] == "baseline"
    info = Path("/proc/cpuinfo")
    flags = info.read_text() if info.exists() else ""
    assert ("avx2" in ISAS) == (" avx2 " in flags)
    assert ("avx512" in ISAS) == (" avx512bw " in flags and " avx512_vnni " in flags)


@pytest.mark.parametrize("cap", ["baseline", "avx2", "avx512", "sse9"])
def test_environment_caps_the_choice(cap: str) -> None:
    code = "import sidechain.ops; from sidechain import _host; print(_host.best_isa())"
    env = os.environ | {"SIDECHAIN_ISA": cap}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    order = ["baseline", "avx2", "avx512"]
    limit = order.index(cap) if cap in order else len(order)
    assert done.stdout.strip() == [i for i in ISAS if order.index(i) <= limit][-1]
    assert ("expected SIDECHAIN_ISA to be one of" in done.stderr) == (cap == "sse9")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"isa": "avx9"}, "expected an ISA this machine supports, got avx9"),
        ({"dtype": "float16"}, "unexpected layout of x"),
        ({"dtype": "int8"}, "expected float32, float16 or bfloat16, got int8"),
        ({"strength": np.ones(3, np.float32)}, "unexpected size of strength"),
    ],
)
def test_bad_calls(change: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        host.tap(np.zeros((2, 3, 4), np.float32), **({"isa": "baseline"} | change))
