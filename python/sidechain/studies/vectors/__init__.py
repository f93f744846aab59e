# SPDX-License-Identifier: Apache-2.0
"""Steering vectors from the prompt pairs of a concept."""

from typing import TYPE_CHECKING

from ..._lazy import lazy

if TYPE_CHECKING:
    from .config import METHODS, VectorConfig
    from .run import build, dictionaries, prompt_pairs, run

__all__ = ["METHODS", "VectorConfig", "build", "dictionaries", "prompt_pairs", "run"]

lazy(
    __name__,
    {
        **dict.fromkeys(("METHODS", "VectorConfig"), ".config"),
        **dict.fromkeys(("build", "dictionaries", "prompt_pairs", "run"), ".run"),
    },
)
