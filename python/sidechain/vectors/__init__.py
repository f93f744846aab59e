# SPDX-License-Identifier: Apache-2.0
"""Steering vectors: how they are made, kept and combined."""

from .caa import caa
from .vector import Provenance, SteeringVector

__all__ = ["Provenance", "SteeringVector", "caa"]
