# SPDX-License-Identifier: Apache-2.0
"""Steering vectors from the prompt pairs of a concept."""

from __future__ import annotations

from .run import METHODS, VectorConfig, build, dictionaries, prompt_pairs, run

__all__ = ["METHODS", "VectorConfig", "build", "dictionaries", "prompt_pairs", "run"]
