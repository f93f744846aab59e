# SPDX-License-Identifier: Apache-2.0
"""How far a concept can be pushed, at which sites, and what it costs: strength sweeps."""

from __future__ import annotations

from .analyse import Steering, kept_attribute
from .run import ARMS, SteeringConfig, run, sweep

__all__ = ["ARMS", "Steering", "SteeringConfig", "kept_attribute", "run", "sweep"]
