# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from sidechain import _triton

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


@pytest.fixture(autouse=True, scope="session")
def patch_once() -> Any:
    """Spare the interpreter more than half of its time (42 s to 17 s of a profiled encode).

    It patches the language again for every call of a function within a kernel. Once is enough.
    """
    if os.environ.get("TRITON_INTERPRET") != "1" or _triton.absent() is not None:
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    patch_language = interpreter._patch_lang

    def patch_once(fn: Any) -> Any:
        found = [v for v in fn.__globals__.values() if v is tl or v is tl.core]
        fresh = [v for v in (*(m.load for m in found), tl.tensor.to) if tl.core.is_builtin(v)]
        return patch_language(fn) if fresh or not found else interpreter._LangPatchScope()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", patch_once)
        yield
