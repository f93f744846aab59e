# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import sidechain
from sidechain.testing import tiny_pipeline


@pytest.fixture
def pipe() -> Any:
    return tiny_pipeline()


@pytest.fixture
def hooked() -> Callable[[Any, str, Callable[[Tensor], Tensor | None]], Any]:
    """Attach a plain forward hook, the thing taps are compared with; returns its handle."""

    def attach(pipe: Any, site: str, function: Callable[[Tensor], Tensor | None]) -> Any:
        module = sidechain.sites(pipe)[site].module
        return module.register_forward_hook(lambda m, a, out: function(out))

    return attach


@pytest.fixture
def direction() -> Tensor:
    return torch.randn(16, generator=torch.Generator().manual_seed(7))
