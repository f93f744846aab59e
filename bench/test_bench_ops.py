# SPDX-License-Identifier: Apache-2.0
"""The CPU cases under pytest-benchmark: `pytest bench -m bench`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench_ops import assert_correct, tap_providers
from sidechain.testing.cases import DTYPES, TAP_BENCH, TapCase


@pytest.mark.bench
@pytest.mark.parametrize("provider", ["eager", "cpu"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("case", TAP_BENCH, ids=lambda c: c.name)
def test_tap(case: TapCase, dtype: torch.dtype, provider: str, benchmark: Any) -> None:
    providers = tap_providers("cpu")
    if provider not in providers:
        pytest.skip("tap_/cpu is not available")
    assert_correct(case, dtype, "cpu")
    args = case.make(dtype)
    benchmark.group = f"{case.name} {str(dtype).removeprefix('torch.')}"
    with torch.inference_mode():
        benchmark(lambda: providers[provider](args))
