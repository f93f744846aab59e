# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import pytest

from sidechain.testing import tiny_pipeline


@pytest.fixture
def pipe() -> Any:
    return tiny_pipeline()
