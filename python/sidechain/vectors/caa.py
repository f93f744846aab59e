# SPDX-License-Identifier: Apache-2.0
"""Contrastive activation addition: mean output with a concept minus mean output without it.

v[t, p, l] = mean_i a(x_i+) - mean_i a(x_i-), scaled to unit norm on request, where a is the mean
over tokens of what site l puts out at step t in pass p. Source: TADA, arXiv 2602.11910.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..pipelines import SiteList, SitePattern, config_hash
from ..pipelines import sites as list_sites
from ..pipelines.generate import generate, model_name, quiet_settings, spread_seeds
from ..taps import Capture, Where, capture
from .vector import Provenance, SteeringVector, unit


def caa(
    pipe: Any,
    positive: Sequence[str],
    negative: Sequence[str],
    sites: SitePattern = "cross:*",
    *,
    seeds: int | Sequence[int] = 0,
    batch_size: int = 8,
    normalise: bool = True,
    passes: str = "all",
    tokens: slice | Tensor | None = None,
    concept: str = "",
    progress: bool = True,
    **call: Any,
) -> SteeringVector:
    """Build a steering vector from pairs of prompts by streaming means.

    Both prompts of a pair run in the same batch from the same noise. Only sums are kept: float32
    over tokens on the device, float64 over prompts.

    Args:
        pipe: diffusers pipeline.
        positive: prompts with the concept.
        negative: prompts without it, one for each positive one.
        sites: see `SiteList.select`.
        seeds: pair i uses seeds[i % len(seeds)]; a number s stands for s, s + 1, ...
        batch_size: pairs in one pipeline call.
        normalise: scale every direction to unit norm; a zero difference stays zero.
        passes: "cond", "uncond" or "all".
        tokens: which tokens to average over, see `taps.Where`.
        concept: name kept with the vector.
        progress: show a progress bar.
        **call: arguments of every pipeline call (num_inference_steps, guidance_scale, ...).

    Returns:
        Directions [steps, C] for each site and pass.

    Raises:
        ValueError: prompts that do not pair up, no seeds, unknown sites.
    """
    pairs = _pairs(positive, negative)
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"caa: expected batch_size >= 1, got {batch_size!r}")
    chosen_seeds = spread_seeds("caa", seeds, len(pairs))
    chosen = list_sites(pipe, sites)
    settings = quiet_settings("caa", pipe, call)
    totals: dict[str, Tensor] = {}  # [2, steps, passes, C] float64: sums over + and over -
    tap = capture(pipe, Where(chosen, passes, tokens=tokens), reduce="mean")
    bar = tqdm(total=len(pairs), desc=f"caa {concept}".strip(), unit="pair", disable=not progress)
    with bar, tap:
        for start in range(0, len(pairs), batch_size):
            batch = pairs[start : start + batch_size]
            batch_seeds = chosen_seeds[start : start + batch_size]
            prompts = [p for p, _ in batch] + [n for _, n in batch]
            generate(pipe, prompts, batch_seeds + batch_seeds, settings)
            _accumulate(totals, tap, chosen, len(batch))
            labels = tap.labels
            tap.clear()
            bar.update(len(batch))
    tensors = {}
    for site in chosen:
        plus, minus = totals[site.name] / len(pairs)
        difference = plus - minus  # [steps, passes, C]
        directions = unit(difference) if normalise else difference
        for place, branch in enumerate(labels.branches):
            tensors[site.name, branch] = directions[:, place].float()
    provenance = Provenance(
        concept=concept,
        method="caa",
        model=model_name(pipe),
        config_hash=config_hash(pipe),
        normalised=normalise,
        positive=len(pairs),
        negative=len(pairs),
        seeds=tuple(chosen_seeds),
        call={k: v for k, v in call.items() if isinstance(v, str | int | float | None)},
    )
    return SteeringVector(
        tensors, timesteps=labels.timesteps, sigmas=labels.sigmas, provenance=provenance
    )


def _pairs(positive: Sequence[str], negative: Sequence[str]) -> list[tuple[str, str]]:
    for name, prompts in (("positive", positive), ("negative", negative)):
        if isinstance(prompts, str) or not all(isinstance(p, str) for p in prompts):
            raise TypeError(f"caa: expected {name} as a list of str, got {prompts!r}")
    if not positive or len(positive) != len(negative):
        raise ValueError(
            f"caa: expected as many negative as positive prompts and at least one, got "
            f"{len(positive)} positive and {len(negative)} negative"
        )
    return list(zip(positive, negative, strict=True))


def _accumulate(totals: dict[str, Tensor], tap: Capture, chosen: SiteList, pairs: int) -> None:
    for site in chosen:
        means = tap[site].double()  # [steps, passes, 2 * pairs, C]
        sums = torch.stack([means[:, :, :pairs].sum(2), means[:, :, pairs:].sum(2)])
        known = totals.get(site.name)
        totals[site.name] = sums if known is None else known + sums
