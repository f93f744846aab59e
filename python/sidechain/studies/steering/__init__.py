# SPDX-License-Identifier: Apache-2.0
"""How far a concept can be pushed, at which sites, and what it costs: strength sweeps."""

from typing import TYPE_CHECKING

from ..._lazy import lazy

if TYPE_CHECKING:
    from .analyse import Steering, kept_attribute
    from .config import ARMS, SteeringConfig
    from .run import run, sweep

__all__ = ["ARMS", "Steering", "SteeringConfig", "kept_attribute", "run", "sweep"]

lazy(
    __name__,
    {
        **dict.fromkeys(("Steering", "kept_attribute"), ".analyse"),
        **dict.fromkeys(("ARMS", "SteeringConfig"), ".config"),
        **dict.fromkeys(("run", "sweep"), ".run"),
    },
)
