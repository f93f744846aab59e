# SPDX-License-Identifier: Apache-2.0
"""Copies that do not wait for the device, and whether it records a CUDA graph."""

from __future__ import annotations

import torch
from torch import Tensor


def capturing() -> bool:
    """Whether the current stream records a CUDA graph instead of running.

    What is filled now is filled again by every replay, and memory taken now belongs to the graph:
    buffers that live longer have to be made before.
    """
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def send(t: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device in the current stream, without waiting for that stream.

    A copy from ordinary memory would wait for all work before it. From pinned memory it does not;
    torch keeps that memory, and uses it again only once the copy is over.
    """
    if device.type == "cuda" and t.device.type == "cpu":
        t = t.pin_memory()
    return t.to(device, non_blocking=True)
