# SPDX-License-Identifier: Apache-2.0
"""Record the outputs of sites into a store on disk while a model generates."""

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
