# SPDX-License-Identifier: Apache-2.0
"""Helpers of the tap tests."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from sidechain import Where


def placed(options: dict[str, Any], sites: str | None = None) -> dict[str, Any]:
    """Gather the options that say where a tap acts into `where`."""
    names = {field.name for field in fields(Where)}
    place = {"sites": sites} | {name: v for name, v in options.items() if name in names}
    return {"where": Where(**place)} | {n: v for n, v in options.items() if n not in names}
