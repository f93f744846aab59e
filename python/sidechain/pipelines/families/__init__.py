# SPDX-License-Identifier: Apache-2.0
"""Pipeline families: one file each, which registers an `Adapter` when it is imported."""

from . import (
    sd,
    stable_audio,
)

__all__ = [
    "sd",
    "stable_audio",
]
