# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
from typing import Any

import pytest
import torch

import triton_support

# Triton decides at import whether it interprets: these files run in two processes.
collect_ignore = (
    ["test_cubin.py", "test_gpu.py"]
    if os.environ.get("TRITON_INTERPRET") == "1"
    else ["test_interpreter.py"]
)


@pytest.fixture(autouse=True)
def poison() -> Any:
    """Fill every new uninitialised tensor with NaN or a huge integer."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for (kind, kernel), n in sorted(triton_support.ran.items()):
        terminalreporter.write_line(f"triton {kind}: {kernel} x {n} cases")
