# SPDX-License-Identifier: Apache-2.0
"""Steering vectors: making, saving and combining them."""

from ..pipelines import PromptPairs
from .caa import caa
from .sae_features import WEIGHTINGS, sae_features
from .vector import Provenance, SteeringVector

__all__ = ["WEIGHTINGS", "PromptPairs", "Provenance", "SteeringVector", "caa", "sae_features"]
