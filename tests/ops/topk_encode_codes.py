# SPDX-License-Identifier: Apache-2.0
"""What the tests of ``topk_encode`` share: its parameters, and its codes in plain Python."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

from ops.support import backend_params, upcast
from sidechain.ops import Codes
from sidechain.testing.cases import DTYPES, TopkEncodeCase

BACKENDS = backend_params("topk_encode")
KERNELS = [p for p in BACKENDS if p.values != ("reference",)]
# "bf16" has no kernel on a CPU.
EXACT = [
    pytest.param(*p.values, precision, marks=p.marks)
    for p in BACKENDS
    for precision in ("fp32", "bf16")
    if (*p.values, precision) != ("cpu", "bf16")
]
FIXED = TopkEncodeCase(6, 20, 50, 4)
BATCH = TopkEncodeCase(6, 20, 50, 4, mode="batch_topk")
THRESHOLD = TopkEncodeCase(6, 20, 50, 4, mode="threshold")

dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_kernel = pytest.mark.parametrize("backend", KERNELS)
every_exact = pytest.mark.parametrize(("backend", "precision"), EXACT)
exact_kernels = pytest.mark.parametrize(
    ("backend", "precision"), [p for p in EXACT if p.values[0] != "reference"]
)
modes = pytest.mark.parametrize("case", [FIXED, BATCH, THRESHOLD], ids=lambda c: c.mode)
# A CPU values up to six rows without a screen.
screened_modes = pytest.mark.parametrize(
    "case", [replace(c, rows=40) for c in (FIXED, BATCH, THRESHOLD)], ids=lambda c: c.mode
)


def dense(
    args: dict[str, Any], precision: str = "fp32", dtype: torch.dtype = torch.float64
) -> Tensor:
    """z [N, F] float32 as the docstring defines it: summed in `dtype`, rounded once."""
    x, w = args["x"].float(), args["w_enc"].float()
    if "b_pre" in args:
        x = x - args["b_pre"].float()
    if precision == "bf16":
        x, w = x.bfloat16(), w.bfloat16()
    z = x.to(dtype) @ w.to(dtype).T
    if "b_enc" in args:
        z = z + args["b_enc"].to(dtype)
    return z.float().relu()


def plain(args: dict[str, Any], z: Tensor) -> Codes:
    """The codes of z, row by row with Python's sort."""
    rows, features = z.shape
    table = z.tolist()
    mode, k = args["mode"], args.get("k", 0)
    if mode == "topk":
        values, indices = torch.zeros(rows, k), torch.full((rows, k), -1, dtype=torch.int32)
        for n, row in enumerate(table):
            best = sorted(range(features), key=lambda f, row=row: (-row[f], f))[:k]
            for j, f in enumerate(f for f in best if row[f] > 0):
                values[n, j], indices[n, j] = row[f], f
        return Codes(values, indices, None)
    positions = [(n, f) for n in range(rows) for f in range(features) if table[n][f] > 0]
    if mode == "batch_topk":
        positions = sorted(positions, key=lambda p: (-table[p[0]][p[1]], p))[: rows * k]
    else:
        limit = args["threshold"]
        limit = limit.tolist() if isinstance(limit, Tensor) else [limit] * features
        positions = [p for p in positions if table[p[0]][p[1]] > limit[p[1]]]
    positions.sort()
    counts = Counter(n for n, _ in positions)
    offsets = torch.tensor([0, *accumulate(counts[n] for n in range(rows))])
    return Codes(
        torch.tensor([table[n][f] for n, f in positions]),
        torch.tensor([f for _, f in positions], dtype=torch.int32),
        offsets,
    )


def assert_same_codes(got: Codes, want: Codes) -> None:
    """Same set in the same order; values equal to the last bit but one."""
    got, want = (Codes(*(t if t is None else t.cpu() for t in codes)) for codes in (got, want))
    assert (got.offsets is None) == (want.offsets is None)
    if got.offsets is not None and want.offsets is not None:
        assert torch.equal(got.offsets, want.offsets)
    assert torch.equal(got.indices, want.indices)
    torch.testing.assert_close(got.values, want.values, rtol=1.3e-7, atol=1e-12, equal_nan=True)


def widened(args: dict[str, Any]) -> dict[str, Any]:
    """The problem that float32 arguments define, in float64: b_pre is subtracted in float32."""
    more = args | {"x": args["x"].float() - args["b_pre"].float()} if "b_pre" in args else args
    return upcast({k: v for k, v in more.items() if k != "guess" and k != "b_pre"})


def plain_nan(args: dict[str, Any]) -> Codes:
    """The codes of a fixed form in which rows of NaN keep their first features."""
    z = dense(args)
    bad = z.isnan().any(-1).cpu()
    codes = plain(args, z.nan_to_num(0.0))
    k = args["k"]
    codes.values[bad], codes.indices[bad] = torch.nan, torch.arange(k, dtype=torch.int32)
    return codes
