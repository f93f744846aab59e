# SPDX-License-Identifier: Apache-2.0
"""Scores of features for a concept, from statistics of their activations with and without it.

All sites are read in one generation; of the activations only sums over tokens are kept. Source of
the scores: TADA, arXiv 2602.11910, and the alternatives of its code.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...ops import CodeSums, code_sums_
from ...pipelines import PromptPairs, config_hash
from ...pipelines import sites as list_sites
from ...pipelines.generate import generate, quiet_settings
from ...pipelines.time_grid import same_grid
from ...taps import Where
from ...taps.stream import StepRows, StreamTap
from ..model import Sae
from .logistic import logistic_weights

EPSILON = 1e-6
#: (token, feature) pairs whose activations are held at once.
_PAIRS = 1 << 22
ACTIVATIONS = ("relu", "selected")


@dataclass(frozen=True)
class FeatureStatistics:
    """Activations of features with a concept (index 0) and without it (index 1).

    "relu" activations are relu(z) of every feature, "selected" ones those that the architecture
    selects; both in normalised units. Scores are made of those that were asked for.

    Attributes:
        steps: scheduler steps [S] int64.
        timesteps: of these steps [S] float64.
        sigmas: of these steps [S] float64, or None.
        mean: of the scored activations over tokens and prompts [S, 2, F] float64.
        variance: of the same, unbiased [S, 2, F].
        selected: mean of the selected activations [S, 2, F].
        rate: share of tokens in which a feature is selected [S, 2, F].
        pooled: the scored activations averaged over the tokens of each generation [S, 2 P, F]
            float32, the P generations with the concept first.
        rows: tokens behind each mean, a step and side.
    """

    steps: Tensor
    timesteps: Tensor
    sigmas: Tensor | None
    mean: Tensor
    variance: Tensor
    selected: Tensor
    rate: Tensor
    pooled: Tensor
    rows: int

    def score(self, method: str = "tada") -> Tensor:
        """Return the scores of all features at all steps [S, F] float64; larger: for the concept.

        With m+ and m- the means with and without it:

        - tada: m+ log(1 + 1 / (m- + 1e-6));
        - diff: m+ - m-;  ratio: m+ / (m- + 1e-6);  mean_pos: m+;
        - cohens_d: (m+ - m-) / (pooled standard deviation + 1e-6);
        - logistic: weights of an L2-regularised logistic regression on standardised pooled
          activations, which tells the generations with the concept from those without.

        Raises:
            ValueError: another method.
        """
        if method not in METHODS:
            raise ValueError(
                f"score: expected method to be one of {', '.join(METHODS)}, got {method!r}"
            )
        return METHODS[method](self)

    def top(self, method: str = "tada", count: int = 20) -> Tensor:
        """Return the best features of every step [S, count], best first, ties lowest number first.

        Raises:
            ValueError: another method, or count outside 1 .. F.
        """
        features = self.mean.shape[2]
        if not 1 <= count <= features:
            raise ValueError(f"top: expected 1 <= count <= {features} [features], got {count}")
        order = torch.sort(self.score(method), dim=1, descending=True, stable=True).indices
        return order[:, :count]


def _tada(s: FeatureStatistics) -> Tensor:
    return s.mean[:, 0] * torch.log1p(1 / (s.mean[:, 1] + EPSILON))


def _cohens_d(s: FeatureStatistics) -> Tensor:
    pooled = s.variance.mean(1).clamp(min=0).sqrt()  # both sides have as many tokens
    return (s.mean[:, 0] - s.mean[:, 1]) / (pooled + EPSILON)


def _logistic(s: FeatureStatistics) -> Tensor:
    half = s.pooled.shape[1] // 2
    return torch.stack([logistic_weights(step.double(), half) for step in s.pooled])


#: The score of TADA and its five alternatives.
METHODS: dict[str, Callable[[FeatureStatistics], Tensor]] = {
    "tada": _tada,
    "diff": lambda s: s.mean[:, 0] - s.mean[:, 1],
    "ratio": lambda s: s.mean[:, 0] / (s.mean[:, 1] + EPSILON),
    "mean_pos": lambda s: s.mean[:, 0],
    "cohens_d": _cohens_d,
    "logistic": _logistic,
}


def feature_statistics(
    pipe: Any,
    saes: Mapping[str, Sae],
    pairs: PromptPairs,
    *,
    activations: str = "relu",
    batch_size: int = 8,
    tokens: slice | None = None,
    progress: bool = True,
    **call: Any,
) -> dict[str, FeatureStatistics]:
    """Read the features of several sites in one generation of every prompt (cond pass).

    Both prompts of a pair run in the same batch from the same noise. A dictionary that normalises
    each step by itself is moved to the time grid of the run.

    Args:
        pipe: diffusers pipeline.
        saes: dictionary of each site.
        pairs: prompts with and without the concept.
        activations: what scores are made of. "relu": relu(z) of every feature, as published; it
            also sees features that are not selected. "selected": those that the dictionary
            selects, without the dense product.
        batch_size: pairs in one pipeline call.
        tokens: slice of tokens. None = all.
        progress: show a progress bar.
        **call: arguments of every pipeline call (num_inference_steps, guidance_scale, ...).

    Returns:
        Statistics by the keys of `saes`.

    Raises:
        ValueError: unknown sites or activations, a dictionary of another width or model.
    """
    if activations not in ACTIVATIONS:
        raise ValueError(
            f"feature_statistics: expected activations to be one of {', '.join(ACTIVATIONS)}, got "
            f"{activations!r}"
        )
    names = _check_fit(pipe, saes)
    settings = quiet_settings("feature_statistics", pipe, call)
    sums = {alias: _Sums(saes[key], activations) for alias, key in names.items()}

    def take(found: StepRows) -> None:
        if found.ready is not None:
            found.ready()
        for alias, rows in found.rows.items():
            sums[alias].add(rows, found)

    tap = StreamTap(pipe, Where(list(names), tokens=tokens), 1, torch.float32, take)
    with tap, tqdm(total=len(pairs), desc="features", unit="pair", disable=not progress) as bar:
        for prompts, seeds in pairs.batches(batch_size):
            generate(pipe, prompts, seeds, settings)
            tap.end()
            bar.update(len(prompts) // 2)
    return {key: sums[alias].result() for alias, key in names.items()}


def on_grid(sae: Sae, timesteps: Tensor, sigmas: Tensor | None = None) -> Sae:
    """Return the dictionary for a run with these timesteps; itself where nothing has to change."""
    normalisers = (sae.normaliser, sae.target_normaliser)
    if all(n.steps is None or _has_grid(n, timesteps) for n in normalisers):
        return sae
    moved = copy.copy(sae)  # shares the weights
    moved._modules = dict(sae._modules)
    moved.normaliser = sae.normaliser.resampled(timesteps, sigmas)
    moved.target_normaliser = (
        moved.normaliser
        if sae.target_normaliser is sae.normaliser
        else sae.target_normaliser.resampled(timesteps, sigmas)
    )
    return moved


def _has_grid(normaliser: Any, timesteps: Tensor) -> bool:
    known = normaliser.timesteps
    return known is None or same_grid(known, timesteps)


@torch.no_grad()
def relu_sums(sae: Sae, x: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """Return sums over tokens of relu(z) and of its square, two [B, F], for x [B, T, d].

    Half of all features are positive in a row: a dense product in tiles, of which only sums stay.
    """
    samples, length, _ = x.shape
    tall = min(length, max(1, _PAIRS // sae.config.features))
    wide = max(1, _PAIRS // (sae.config.features * tall))
    sums = x.new_zeros(samples, sae.config.features, dtype=torch.float32)
    squares = torch.zeros_like(sums)
    for first in range(0, samples, wide):
        own = slice(first, first + wide)
        for start in range(0, length, tall):
            tile = x[own, start : start + tall]
            z = sae.preactivations(tile, step=step).relu_().view(*tile.shape[:2], -1)
            sums[own] += z.sum(1)
            squares[own] += z.square_().sum(1)
    return sums, squares


@torch.no_grad()
def selected_sums(sae: Sae, x: Tensor, step: int) -> CodeSums:
    """Return sums over tokens of the selected features, [B, F] each, for x [B, T, d]."""
    samples, length, width = x.shape
    features, rows = sae.config.features, x.reshape(-1, width)
    label = torch.arange(samples, device=x.device).repeat_interleave(length)
    chunk = max(1, _PAIRS // (sae.config.k or features))
    found = CodeSums.zeros(samples, features, x.device)
    for start in range(0, len(rows), chunk):
        part = slice(start, start + chunk)
        codes = sae.encode(rows[part], step=step)
        code_sums_(found, codes.values, codes.indices, offsets=codes.offsets, label=label[part])
    return found


def _check_fit(pipe: Any, saes: Mapping[str, Sae]) -> dict[str, str]:
    """Return alias of each site -> key in `saes`."""
    if not saes:
        raise ValueError("feature_statistics: expected at least one dictionary, got none")
    here, names = config_hash(pipe), {}
    for key, sae in saes.items():
        (site,) = list_sites(pipe, key)
        if sae.config.d_in != site.width:
            raise ValueError(
                f"feature_statistics: expected a dictionary of width {site.width} [of {site}], "
                f"got {sae.config.d_in}"
            )
        made_for = sae.provenance.config_hash
        if made_for and made_for != here:
            raise ValueError(
                f"feature_statistics: expected a dictionary for a denoiser with config hash {here} "
                f"[this pipeline], got {made_for}"
            )
        names[site.alias] = key
    return names


class _Sums:
    """Sums at one site: [S, 2, F] in float64 by side, and the mean of each generation."""

    def __init__(self, sae: Sae, activations: str) -> None:
        self.source = self.sae = sae
        self.relu = activations == ACTIVATIONS[0]
        self.generation: Any = None
        self.totals: dict[int, dict[str, Tensor]] = {}
        self.pooled: dict[int, list[Tensor]] = {}
        self.rows: dict[int, int] = {}

    def add(self, rows: Tensor, found: StepRows) -> None:
        """Add the rows of a step: the first half of the samples has the concept."""
        if self.generation is None or not same_grid(
            self.generation.timesteps, found.generation.timesteps
        ):
            self.generation = found.generation
            self.sae = on_grid(self.source, found.generation.timesteps, found.generation.sigmas)
        samples, length = found.samples, len(found.tokens)
        features = self.sae.config.features
        x = rows.to(self.sae.w_enc.device).view(samples, length, -1)
        selected = selected_sums(self.sae, x, found.step)
        sums, squares = selected.sums, selected.squares
        if self.relu:
            sums, squares = relu_sums(self.sae, x, found.step)
        half = samples // 2
        found_sums = {
            "sum": sums,
            "square": squares,
            "selected": selected.sums,
            "fired": selected.counts,
        }
        known = self.totals.setdefault(found.step, {})
        for name, value in found_sums.items():
            sides = value.double().cpu().reshape(2, half, features).sum(1)
            known[name] = sides if name not in known else known[name] + sides
        self.pooled.setdefault(found.step, []).append((sums / length).cpu())
        self.rows[found.step] = self.rows.get(found.step, 0) + half * length

    def result(self) -> FeatureStatistics:
        steps = sorted(self.totals)
        rows = self.rows[steps[0]]
        stacked = {
            name: torch.stack([self.totals[step][name] for step in steps])
            for name in ("sum", "square", "selected", "fired")
        }
        mean = stacked["sum"] / rows
        spread = stacked["square"] - rows * mean.square()
        halves = [
            [torch.cat([part.chunk(2)[side] for part in self.pooled[step]]) for side in (0, 1)]
            for step in steps
        ]
        chosen = torch.tensor(steps)
        sigmas = self.generation.sigmas
        return FeatureStatistics(
            steps=chosen,
            timesteps=self.generation.timesteps[chosen],
            sigmas=None if sigmas is None else sigmas[chosen],
            mean=mean,
            variance=spread.clamp(min=0) / max(1, rows - 1),
            selected=stacked["selected"] / rows,
            rate=stacked["fired"] / rows,
            pooled=torch.stack([torch.cat(sides) for sides in halves]),
            rows=rows,
        )
