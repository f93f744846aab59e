# SPDX-License-Identifier: Apache-2.0
"""Every kernel on a GPU, where there is one."""

from __future__ import annotations

import pytest
import torch

import shown
from sidechain import _triton
from triton_support import CALLS, Call

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(_triton.absent() is not None, reason=str(_triton.absent())),
]
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())


@dtypes
@pytest.mark.parametrize("call", CALLS, ids=lambda c: f"{c.op}-{c.name}")
def test_against_float64(call: Call, dtype: torch.dtype) -> None:
    call.check(dtype, "cuda")
    shown.CASES[f"triton GPU: {call.op}"] += 1


@dtypes
@pytest.mark.parametrize("call", CALLS, ids=lambda c: f"{c.op}-{c.name}")
def test_same_bits_every_time(call: Call, dtype: torch.dtype) -> None:
    first = call.run(call.make(dtype, "cuda"), "triton")
    for _ in range(5):
        again = call.run(call.make(dtype, "cuda"), "triton")
        for name, value in first.items():
            assert torch.equal(value, again[name]), name
