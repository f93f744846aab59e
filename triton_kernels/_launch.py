# SPDX-License-Identifier: Apache-2.0
"""The one place that launches Triton kernels, with what must not depend on Triton's version."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **settings: Any) -> None:
    """Run a kernel with products and sums fused into one rounding.

    Triton up to 3.9 fuses unless told otherwise, later ones do not. No kernel here needs it for a
    right result; what needs pinning is that every version gives the same bits at the same speed.

    Args:
        kernel: a `triton.jit` function.
        grid: programs along each axis.
        args: arguments of the kernel, in order.
        settings: its constexpr arguments, warps and stages.
    """
    kernel[grid](*args, enable_fp_fusion=True, **settings)


def on_device(t: Tensor) -> Any:
    """Launch where a tensor is."""
    return torch.cuda.device(t.device) if t.is_cuda else nullcontext()
