# SPDX-License-Identifier: Apache-2.0
"""What happens at a site: record it, replace it, steer it."""

from .base import Tap
from .cache_context import Share, share
from .capture import Capture, Labels, capture, contexts
from .patch import Patch, patch
from .steer import MODES, Steer, VectorLike, steer

__all__ = [
    "MODES",
    "Capture",
    "Labels",
    "Patch",
    "Share",
    "Steer",
    "Tap",
    "VectorLike",
    "capture",
    "contexts",
    "patch",
    "share",
    "steer",
]
