# SPDX-License-Identifier: Apache-2.0
"""Measurements whose answer is known, for the analyses and the pages."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd

#: arm -> gain and distance at strength 1
SLOPES = {"localized": (0.2, 1.0), "all": (0.1, 2.0), "random": (0.0, 9.0)}


def readings(kept: Callable[[str, float], float] = lambda arm, strength: 1.0) -> pd.DataFrame:
    """Readings where distance is the strength and the score grows by a known slope."""
    rows = []
    for prompt in range(5):
        for scorer in ("latent", "mel"):
            for arm, strength in [
                ("none", 0.0),
                *((arm, s) for arm in SLOPES for s in (1.0, 2.0, 3.0)),
            ]:
                slope, speed = SLOPES.get(arm, (0.0, 0.0))
                rows.append(
                    {
                        "concept": "drums",
                        "prompt": prompt,
                        "text": "flute",
                        "arm": arm,
                        "strength": strength,
                        "scorer": scorer,
                        "score": 0.1 + slope * strength,
                        "distance": speed * strength,
                        "instrument_kept": kept(arm, strength),
                    }
                )
    return pd.DataFrame(rows)


#: concept -> score of every preset: no prompt 0, the whole prompt 4
SCORES = {
    "drums": {
        **{"none": 0.0, "all": 4.0, "cross:0": 0.4, "cross:1": 3.0, "cross:2": 0.0},
        **{"cross:0-1": 3.4, "cross:1-2": 3.0, "top:1": 3.0, "top:2": 3.8},
    },
    "violin": {
        **{"none": 0.0, "all": 4.0, "cross:0": 0.0, "cross:1": 0.0, "cross:2": 1.2},
        **{"cross:0-1": 0.0, "cross:1-2": 1.2, "top:1": 1.2, "top:2": 2.8},
    },
}


def scores(concept: str, stage: str, seeds: tuple[int, ...] = (0,)) -> pd.DataFrame:
    """Scores of a concept in one stage of a localization: "sites" or "top"."""
    return pd.DataFrame(
        [
            {
                "concept": concept,
                "preset": preset,
                "pair": pair,
                "seed": seed,
                "scorer": scorer,
                "probability": score / 4,
                "score": score,
            }
            for preset, score in SCORES[concept].items()
            if preset.startswith("top:") == (stage == "top")
            for pair in range(3)
            for seed in seeds
            for scorer in ("latent", "mel")
        ]
    )
