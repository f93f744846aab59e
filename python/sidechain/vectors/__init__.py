# SPDX-License-Identifier: Apache-2.0
"""Steering vectors: how they are made, kept and combined."""

from .caa import caa
from .sae_features import WEIGHTINGS, sae_features
from .vector import Provenance, SteeringVector

__all__ = ["WEIGHTINGS", "Provenance", "SteeringVector", "caa", "sae_features"]
