# SPDX-License-Identifier: Apache-2.0
"""What happens at a site: record it, replace it, steer it."""

from .base import Tap
from .capturing import Capture, Labels, capture, contexts
from .patching import Patch, patch
from .sharing import Share, share
from .steering import MODES, Steer, VectorLike, steer

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
