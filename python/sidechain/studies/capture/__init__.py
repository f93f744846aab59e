# SPDX-License-Identifier: Apache-2.0
"""Recording: what sites put out while a model generates, into a store on disk."""

from typing import TYPE_CHECKING

from ..._lazy import lazy

if TYPE_CHECKING:
    from .config import CaptureConfig
    from .run import run

__all__ = ["CaptureConfig", "run"]

lazy(
    __name__,
    {
        "CaptureConfig": ".config",
        "run": ".run",
    },
)
