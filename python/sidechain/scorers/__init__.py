# SPDX-License-Identifier: Apache-2.0
"""Scorers of generated samples and distances between them: CLAP, CLIP, the zoo, functions."""

from typing import TYPE_CHECKING

from .._lazy import lazy

if TYPE_CHECKING:
    from .distance import FeatureDistance, LpipsDistance, SpectralDistance
    from .load import load_distance, load_scorers, scorers_digest
    from .protocol import Distance, Scorer, read_scores
    from .samples import Samples

__all__ = [
    "Distance",
    "FeatureDistance",
    "LpipsDistance",
    "Samples",
    "Scorer",
    "SpectralDistance",
    "load_distance",
    "load_scorers",
    "read_scores",
    "scorers_digest",
]

lazy(
    __name__,
    {
        **dict.fromkeys(("FeatureDistance", "LpipsDistance", "SpectralDistance"), ".distance"),
        **dict.fromkeys(("load_distance", "load_scorers", "scorers_digest"), ".load"),
        **dict.fromkeys(("Distance", "Scorer", "read_scores"), ".protocol"),
        "Samples": ".samples",
    },
)
