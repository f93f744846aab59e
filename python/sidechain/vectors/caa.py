# SPDX-License-Identifier: Apache-2.0
"""Contrastive activation addition: mean output with a concept minus mean output without it.

v[t, p, l] = mean_i a(x_i+) - mean_i a(x_i-), scaled to unit norm on request, where a is the mean
over tokens of what site l puts out at step t in branch p. Source: TADA, arXiv 2602.11910.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..pipelines import PromptPairs, SiteList, SitePattern
from ..pipelines.generate import generate, quiet_settings
from ..taps import Capture, Where, capture
from ..taps.recording import Labels
from .vector import Provenance, SteeringVector, unit


def caa(
    pipe: Any,
    pairs: PromptPairs,
    where: Where | SitePattern = "cross:*",
    *,
    batch_size: int = 8,
    normalise: bool = True,
    progress: bool = True,
    **call: Any,
) -> SteeringVector:
    """Build a steering vector from pairs of prompts by streaming means.

    Both prompts of a pair run in the same batch from the same noise. Only sums are kept: float32
    over tokens on the device, float64 over prompts.

    Args:
        pipe: diffusers pipeline.
        pairs: prompts with and without the concept.
        where: sites, branches (None = all there are) and tokens to average over; all steps.
        batch_size: pairs in one pipeline call.
        normalise: scale every direction to unit norm; a zero difference stays zero.
        progress: show a progress bar.
        **call: arguments of every pipeline call (num_inference_steps, guidance_scale, ...).

    Returns:
        Directions [steps, C] for each site and branch.

    Raises:
        ValueError: unknown sites or options, or a branch asked for that some steps do not have.
        RuntimeWarning: such a branch that was not asked for; it gets no directions.
    """
    where = Where.of(where)
    if where.steps is not None:
        raise ValueError(
            f"caa: expected all steps [a vector has a direction for each], got {where.steps!r}"
        )
    chosen = where.chosen(pipe, "cross:*")
    tapped = replace(where, sites=chosen, branches=where.branches or "all")
    settings = quiet_settings("caa", pipe, call)
    totals: dict[str, Tensor] = {}  # [2, steps, branches, C] float64: sums over + and over -
    tap = capture(pipe, tapped, reduce="mean")
    title = f"caa {pairs.concept}".strip()
    with tap, tqdm(total=len(pairs), desc=title, unit="pair", disable=not progress) as bar:
        for prompts, seeds in pairs.batches(batch_size):
            generate(pipe, prompts, seeds, settings)
            _accumulate(totals, tap, chosen, len(prompts) // 2)
            labels = tap.labels
            tap.clear()
            bar.update(len(prompts) // 2)
    whole = _whole_branches(labels, where.branches)
    tensors = {}
    for site in chosen:
        plus, minus = totals[site.name] / len(pairs)
        difference = plus - minus  # [steps, branches, C]
        directions = unit(difference) if normalise else difference
        for place, branch in enumerate(labels.branches):
            if branch not in whole:
                continue
            tensors[site.name, branch] = directions[:, place].float()
    provenance = replace(Provenance.of(pipe, "caa", pairs, call), normalised=normalise)
    return SteeringVector(
        tensors, timesteps=labels.timesteps, sigmas=labels.sigmas, provenance=provenance
    )


def _whole_branches(labels: Labels, wanted: str | None) -> tuple[str, ...]:
    """Return the branches that every step has: guidance may be off in some of them."""
    share = dict(zip(labels.branches, labels.present.double().mean(0).tolist(), strict=True))
    partial = [branch for branch in labels.branches if share[branch] < 1.0]
    if partial:
        text = (
            f"a direction of the {partial[0]} branch for each of {len(labels.steps)} steps, got "
            f"the branch in {round(share[partial[0]] * len(labels.steps))} of them [guidance in an "
            "interval of steps]"
        )
        if wanted is not None:
            raise ValueError(f"caa: expected {text}")
        warnings.warn(f"caa: expected {text}: it is left out", RuntimeWarning, stacklevel=3)
    return tuple(branch for branch in labels.branches if branch not in partial)


def _accumulate(totals: dict[str, Tensor], tap: Capture, chosen: SiteList, pairs: int) -> None:
    for site in chosen:
        means = tap[site].double()  # [steps, branches, 2 * pairs, C]
        sums = torch.stack([means[:, :, :pairs].sum(2), means[:, :, pairs:].sum(2)])
        known = totals.get(site.name)
        totals[site.name] = sums if known is None else known + sums
