# SPDX-License-Identifier: Apache-2.0
"""Helpers of the op tests."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sidechain.bench.ops._build import copy as clone
from sidechain.bench.ops._build import upcast as upcast
from sidechain.ops import _library

__all__ = ["DEVICE", "backend_params", "clone", "guarded", "guards_intact", "need_kernel", "upcast"]
DEVICE = {"reference": "cpu", "cpu": "cpu", "cuda": "cuda", "triton": "cuda"}


def backend_params(op: str) -> list[Any]:
    """Every backend an op is meant to have; one that cannot run here is skipped with its reason."""
    params = []
    for backend in _library.planned(op):
        reason = _library.unavailable(op, backend)
        marks = [pytest.mark.gpu] if DEVICE[backend] == "cuda" else []
        marks += [pytest.mark.skip(reason=f"{op}/{backend}: {reason}")] if reason else []
        params.append(pytest.param(backend, marks=marks))
    return params


def need_kernel(op: str, backend: str = "cpu") -> None:
    """Skip what only a kernel promises where there is none; a GPU is not asked."""
    reason = None if backend == "cuda" else _library.unavailable(op, "cpu")
    if reason:
        pytest.skip(f"{op}/cpu: {reason}")


def _sentinel(dtype: torch.dtype) -> Tensor:
    """What no test writes; of masks, the value that would change a result."""
    return torch.full((1,), -12345.0).to(dtype)


def guarded(t: Tensor, offset: int, pad: int = 64) -> tuple[Tensor, Tensor]:
    """A view of t's content at an odd offset inside a larger buffer full of sentinels."""
    size = t.numel() + offset + pad
    whole = _sentinel(t.dtype).to(t.device).repeat(size)
    view = whole[offset : offset + t.numel()].view(t.shape)
    view.copy_(t)
    return view, whole


def guards_intact(whole: Tensor, view: Tensor, offset: int) -> bool:
    """Whether nothing was written around a guarded view."""
    sentinel = _sentinel(whole.dtype).to(whole.device)
    return bool(
        (whole[:offset] == sentinel).all() and (whole[offset + view.numel() :] == sentinel).all()
    )
