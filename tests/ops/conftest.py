# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Fill every new uninitialised tensor with NaN or a huge integer."""
    before = torch.are_deterministic_algorithms_enabled()
    # Some references have no deterministic form on a GPU; they are compared, not repeated.
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)
