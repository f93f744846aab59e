# SPDX-License-Identifier: Apache-2.0
"""Copies that do not wait for the device, and the check for CUDA graph capture."""

from __future__ import annotations

import torch
from torch import Tensor


def capturing() -> bool:
    """Whether the current stream records a CUDA graph instead of running.

    During a capture every fill is repeated by each replay, and new memory belongs to the graph:
    buffers that live longer must be made before.
    """
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def send(t: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device in the current stream, without waiting for that stream.

    A copy from pageable memory would wait for all earlier work. A copy from pinned memory does not;
    torch keeps that memory and reuses it only after the copy.
    """
    if device.type == "cuda" and t.device.type == "cpu":
        t = t.pin_memory()
    return t.to(device, non_blocking=True)
