# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from gpu.support import DEVICES


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Where the test runs: on a GPU, or on the CPU to rehearse it."""
    chosen: str = request.param
    return chosen


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    """Compare with the CPU what a convolution computes in float32, not in TF32."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.fixture
def pipe() -> Iterator[Any]:
    """A tiny pipeline on the CPU; without diffusers the test is skipped."""
    from sidechain.testing import tiny_pipeline

    yield tiny_pipeline("music")
