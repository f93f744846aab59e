# SPDX-License-Identifier: Apache-2.0
"""What happens at a site: record it, replace it, steer it."""

from .base import Tap, attached, detach_all
from .cache_context import CachedContext, cache_context
from .capture import Capture, capture, contexts
from .edit import Edit, edit
from .feature_edit import SaeLike
from .heads import HeadCapture
from .maps import MapCapture
from .options import Where
from .patch import Patch, patch
from .recording import Labels
from .steer import MODES, Steer, steer
from .vector_table import VectorLike

__all__ = [
    "MODES",
    "CachedContext",
    "Capture",
    "Edit",
    "HeadCapture",
    "Labels",
    "MapCapture",
    "Patch",
    "SaeLike",
    "Steer",
    "Tap",
    "VectorLike",
    "Where",
    "attached",
    "cache_context",
    "capture",
    "contexts",
    "detach_all",
    "edit",
    "patch",
    "steer",
]
