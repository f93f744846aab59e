# SPDX-License-Identifier: Apache-2.0
"""Changes while a generation is under way."""

from __future__ import annotations

from ..pipelines import Generation
from .base import Tap


def live_generation(tap: Tap) -> Generation | None:
    """Return the generation whose buffers are in use, None between generations."""
    tracker, generation = tap._tracker, tap._generation
    if tracker is None or generation is None or tracker.generation is not generation:
        return None
    return generation if tracker.step < generation.steps else None
