# SPDX-License-Identifier: Apache-2.0
"""Steering vectors from dictionary features: decoder rows of those that score best for a concept.

v[t] = scale[t] sum_{j in top(t)} a_j w_dec[j]: the best features of step t, weighted, in the units
of the activations. Source: TADA, arXiv 2602.11910.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..pipelines import PromptPairs
from ..pipelines import sites as list_sites
from ..sae import Sae
from ..sae.features.scoring import FeatureStatistics, on_grid
from .vector import Provenance, SteeringVector

#: Weights made of scores [k], scaled to sum 1 afterwards; "natural" and "none" use no scores.
_SCORE_WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "raw": lambda score: score,
    "softmax": lambda score: score.softmax(0),
    "sqrt": lambda score: score.clamp(min=0).sqrt(),
    "log": lambda score: score.clamp(min=0).log1p(),
}
WEIGHTINGS = ("natural", "none", *_SCORE_WEIGHTS)


def sae_features(
    pipe: Any,
    saes: Mapping[str, Sae],
    statistics: Mapping[str, FeatureStatistics],
    pairs: PromptPairs | None = None,
    *,
    method: str = "tada",
    count: int = 20,
    weighting: str = "natural",
    from_steps: Sequence[int] | None = None,
    **call: Any,
) -> SteeringVector:
    """Build a steering vector from the features that score best for a concept.

    Args:
        pipe: the pipeline that the statistics are of.
        saes: dictionary of each site.
        statistics: of `feature_statistics`, by the same keys.
        pairs: the prompts behind the statistics, for the record.
        method: score that picks features, one of `sidechain.sae.features.scoring.METHODS`.
        count: features at each step.
        weighting: "natural": a_j is how much larger the selected activation of feature j is with
            the concept than without it, so that strength 1 is the natural difference in these
            features; "none": a_j = 1, as published; "raw", "softmax", "sqrt" or "log" of the
            scores, scaled to sum 1.
        from_steps: pick and weigh by these steps alone and use the mean of their directions at
            every step; None = every step has its own features.
        **call: arguments of the pipeline calls behind the statistics, for the record.

    Returns:
        Directions [S, C] of the cond branch for each site.

    Raises:
        ValueError: unknown options, steps that were not read, sites without a dictionary.
    """
    if weighting not in WEIGHTINGS:
        raise ValueError(
            f"sae_features: expected weighting to be one of {', '.join(WEIGHTINGS)}, got "
            f"{weighting!r}"
        )
    missing = sorted(statistics.keys() - saes.keys())
    if missing or not statistics:
        raise ValueError(
            f"sae_features: expected statistics of sites {sorted(saes)} [with a dictionary], got "
            f"{missing or 'none'}"
        )
    tensors = {}
    for key, found in statistics.items():
        (site,) = list_sites(pipe, key)
        sae = on_grid(saes[key], *_grid(found))
        tensors[site.name, "cond"] = _directions(sae, found, method, count, weighting, from_steps)
    first = next(iter(statistics.values()))
    provenance = Provenance.of(pipe, f"sae:{method}:{weighting}:{count}", pairs, call)
    return SteeringVector(
        tensors, timesteps=first.timesteps, sigmas=first.sigmas, provenance=provenance
    )


def _grid(found: FeatureStatistics) -> tuple[Tensor, Tensor | None]:
    """Return timesteps and noise levels by step number, as far as they were read."""
    if found.steps.tolist() == list(range(len(found.steps))):
        return found.timesteps, found.sigmas
    raise ValueError(
        f"sae_features: expected statistics of steps 0, 1, ..., got {found.steps.tolist()}"
    )


def _directions(
    sae: Sae,
    found: FeatureStatistics,
    method: str,
    count: int,
    weighting: str,
    from_steps: Sequence[int] | None,
) -> Tensor:
    """Return the directions [S, C] of one site."""
    scores, chosen = found.score(method), found.top(method, count)
    rows = sae.w_dec.detach().double().cpu()
    scale = sae.target_normaliser.scale.double().cpu().expand(len(found.steps))
    each = []
    for place in range(len(found.steps)):
        picked = chosen[place]
        if weighting == "none":
            weights = torch.ones(count, dtype=torch.float64)
        elif weighting == "natural":
            weights = (found.selected[place, 0] - found.selected[place, 1])[picked]
        else:
            weights = _SCORE_WEIGHTS[weighting](scores[place, picked])
            weights = (
                weights / weights.sum()
                if weights.sum() > 0
                else torch.full_like(weights, 1 / count)
            )
        each.append(weights @ rows[picked])
    directions = torch.stack(each)
    if from_steps is not None:
        known = found.steps.tolist()
        unread = [step for step in from_steps if step not in known]
        if unread or not len(from_steps):
            raise ValueError(f"sae_features: expected from_steps of {known}, got {from_steps!r}")
        shared = directions[[known.index(step) for step in from_steps]].mean(0)
        directions = shared.expand_as(directions)
    return (directions * scale[:, None]).float()
