# SPDX-License-Identifier: Apache-2.0
"""Small trained models that ship with the package, and the recipes that made them (floor 4)."""

from __future__ import annotations

from .load import judges, music

__all__ = ["judges", "music"]
