# SPDX-License-Identifier: Apache-2.0
"""Pipeline families: one file each, which registers an `Adapter` when it is imported."""

from . import (
    audioldm2,
    sd,
    stable_audio,
)

__all__ = [
    "audioldm2",
    "sd",
    "stable_audio",
]
