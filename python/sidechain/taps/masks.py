# SPDX-License-Identifier: Apache-2.0
"""Masks of attention: which tokens of a context may be read."""

from __future__ import annotations

from torch import Tensor

#: Arguments of processors that mask keys, not queries.
KEY_MASKS = ("attention_mask", "context_mask", "encoder_attention_mask")
_MASKED = -10_000.0  # added to the scores of what may not be read, as diffusers does


def readable(mask: Tensor) -> Tensor:
    """Turn a mask of attention, [R, S] or [R, 1, S], bool or added to the scores, into bool."""
    flat = mask.flatten(1)
    return flat > -1.0 if flat.dtype.is_floating_point else flat.bool()


def as_mask(allowed: Tensor, like: Tensor) -> Tensor:
    """Turn [R, S] bool into the form of a mask of attention."""
    if not like.dtype.is_floating_point:
        return allowed.to(like.dtype).view_as(like)
    return ((1 - allowed.to(like.dtype)) * _MASKED).view_as(like)
