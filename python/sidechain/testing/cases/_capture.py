# SPDX-License-Identifier: Apache-2.0
"""Capture buffers of a case: the same for every op that writes them."""

from __future__ import annotations

from typing import Any

import torch


def capture_arguments(case: Any, slots: int, channels: int, g: torch.Generator) -> dict[str, Any]:
    """Make the buffers of a case, with a known content, and the slot that is written."""
    rows, tokens = case.rows, case.tokens
    args: dict[str, Any] = {}
    if case.sums:
        args["sums"] = torch.randn(slots, rows, channels, generator=g)
    if case.squares:
        args["squares"] = torch.rand(slots, rows, channels, generator=g)
    if case.counts:
        args["counts"] = torch.full((slots, rows), 3.0)
    if case.ring is not None:
        kept = -(-tokens // case.ring_stride)
        args["ring"] = torch.full((slots, rows, kept, channels), 7.0, dtype=case.ring)
        args["ring_stride"] = case.ring_stride
    if case.sums or case.squares or case.counts or case.ring is not None:
        args["capture_slot"] = torch.tensor([1])
        if case.capture_mask:
            args["capture_mask"] = torch.rand(case.capture_mask, tokens, generator=g) < 0.6
    return args
