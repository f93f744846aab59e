# SPDX-License-Identifier: Apache-2.0
"""Recording: what sites put out while a model generates, into a store on disk."""

from __future__ import annotations

from .run import CaptureConfig, run

__all__ = ["CaptureConfig", "run"]
