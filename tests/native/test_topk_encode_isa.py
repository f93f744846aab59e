# SPDX-License-Identifier: Apache-2.0
"""Every instruction set finds the same codes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from sidechain import _native
from sidechain.testing.cases import TOPK_ENCODE_CASES, TopkEncodeCase, encode_case

host: Any = _native.host()
pytestmark = pytest.mark.skipif(host is None, reason=f"_host: {_native.absent('_host')}")
ISAS = host.isas() if host else []


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", TOPK_ENCODE_CASES, ids=lambda c: c.name)
def test_parity(case: TopkEncodeCase, isa: str) -> None:
    args = case.make(torch.float32)
    args.pop("guess", None)
    want = encode_case(args)
    kw: dict[str, Any] = {n: args[n].numpy() for n in ("b_enc", "b_pre") if n in args}
    if case.mode == "threshold":
        limit = torch.as_tensor(args["threshold"], dtype=torch.float32)
        kw["threshold"] = limit.expand(case.features).contiguous().numpy()
    else:
        kw |= {"k": case.k, "batch": case.mode == "batch_topk"}
    values, indices, offsets, _ = host.topk_encode(
        args["x"].numpy(), args["w_enc"].numpy(), isa=isa, **kw
    )
    np.testing.assert_array_equal(indices, want.indices.numpy())
    np.testing.assert_allclose(values, want.values.numpy(), rtol=1.3e-7)
    if want.offsets is not None:
        np.testing.assert_array_equal(offsets, want.offsets.numpy())


def int8_sets(isa: str, args: dict[str, Any], k: int) -> np.ndarray:
    arrays = {n: args[n].numpy() for n in ("b_enc", "b_pre")}
    _, indices, _, _ = host.topk_encode(
        args["x"].numpy(), args["w_enc"].numpy(), isa=isa, k=k, precision=2, **arrays
    )
    return np.asarray(indices)


@pytest.mark.parametrize("isa", ISAS)
def test_int8_recalls(isa: str) -> None:
    """Codes of x are 7.25 bits wide on AVX2, whose sums of products have 16, and 8 elsewhere."""
    args = TopkEncodeCase(70, 200, 2000, 12).make(torch.float32)
    exact = encode_case(args).indices.numpy()
    found = int8_sets(isa, args, 12)
    recall = (found[:, :, None] == exact[:, None]).any(-1).mean()
    assert recall > (0.997 if isa == "avx2" else 0.998)


@pytest.mark.skipif("avx512" not in ISAS, reason="no AVX-512 on this machine")
def test_int8_screens_alike() -> None:
    """Sums in 32 bits are exact: what the processor adds is what plain C++ adds."""
    args = TopkEncodeCase(70, 200, 2000, 12).make(torch.float32)
    same = int8_sets("avx512", args, 12) == int8_sets("baseline", args, 12)
    assert same.mean() > 0.999  # the norms of rows are summed in another order


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"isa": "avx9"}, "expected an ISA this machine supports, got avx9"),
        ({"w": np.zeros((5, 3), np.float32)}, r"expected x \[N, d\] and w \[F, d\]"),
        ({"k": 6}, "expected 1 <= k <= F"),
        ({"b_pre": np.zeros(5, np.float32)}, "unexpected size of b_pre"),
        ({"precision": 1}, "expected precision 0 or 2"),
    ],
)
def test_bad_calls(change: dict[str, Any], match: str) -> None:
    args = {
        "x": np.zeros((2, 4), np.float32), "w": np.zeros((5, 4), np.float32), "k": 2,
        "isa": "baseline",
    }  # fmt: skip
    with pytest.raises(ValueError, match=match):
        host.topk_encode(**(args | change))
