# SPDX-License-Identifier: Apache-2.0
"""Metrics of a dictionary on rows it was not trained on, and the top examples of its features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...store import ActivationStore
from ..model import Codes, Sae


@dataclass(frozen=True)
class Health:
    """Metrics of a dictionary on N rows.

    Attributes:
        rows: N.
        fvu: sum |y - y_hat|^2 / sum |y - mean of its step|^2 in normalised units, in which every
            step weighs the same.
        raw_fvu: the same in the units of the activations, where steps of large variance dominate.
        steps: scheduler steps [S].
        step_fvu: fvu of each step [S] (units cancel).
        l0: active features per row.
        dead: share of features that were active in no row.
        density: share of rows in which each feature is active [F].
    """

    rows: int
    fvu: float
    raw_fvu: float
    steps: Tensor
    step_fvu: Tensor
    l0: float
    dead: float
    density: Tensor


def measure(sae: Sae, store: ActivationStore, *, batch: int = 4096) -> Health:
    """Encode and reconstruct every row of a store, and return the metrics.

    Raises:
        ValueError: an empty store, another width, or steps the dictionary does not know.
    """
    if not len(store):
        raise ValueError("measure: expected a store with rows, got an empty one")
    device, features = sae.w_enc.device, sae.config.features
    steps = torch.unique(store.labels(torch.arange(len(store))).step)
    slots, width = len(steps), sae.config.d_in
    errors, squares, counts = (torch.zeros(slots, dtype=torch.float64) for _ in range(3))
    sums = torch.zeros(slots, width, dtype=torch.float64)
    fired = torch.zeros(features, dtype=torch.int64)
    for got in store.batches(batch, shuffle="off", labels=True, drop_last=False, device=device):
        assert got.labels is not None
        x, step = got.x.float(), got.step
        with torch.no_grad():
            codes = sae.encode(x, step=step)
            y = sae.normaliser.normalise(x, step)
            y_hat = sae.normaliser.normalise(sae.decode(codes, step=step), step)
        place = torch.searchsorted(steps, got.labels.step)
        errors.index_add_(0, place, (y - y_hat).double().square().sum(1).cpu())
        squares.index_add_(0, place, y.double().square().sum(1).cpu())
        sums.index_add_(0, place, y.double().cpu())
        counts.index_add_(0, place, torch.ones(len(x), dtype=torch.float64))
        fired += active_counts(codes, features).cpu()
    variance = squares - sums.square().sum(1) / counts
    scale = _scales(sae, steps).square()
    return Health(
        rows=len(store),
        fvu=float(errors.sum() / variance.sum()),
        raw_fvu=float((scale * errors).sum() / (scale * variance).sum()),
        steps=steps,
        step_fvu=errors / variance,
        l0=float(fired.sum() / len(store)),
        dead=float((fired == 0).double().mean()),
        density=fired.double() / len(store),
    )


def _scales(sae: Sae, steps: Tensor) -> Tensor:
    entry = sae.normaliser.entry(steps.to(sae.w_enc.device))
    scale = sae.normaliser.scale[entry].double().cpu()
    return scale.expand(len(steps))


def active_counts(codes: Codes, features: int) -> Tensor:
    """Return the number of rows in which each feature is active [F] int64."""
    live = codes.indices[(codes.indices >= 0) & (codes.values > 0)]
    return torch.bincount(live.long(), minlength=features)


def rows_of(codes: Codes) -> Tensor:
    """Return the row of every entry of sparse codes, in the shape of the values."""
    if codes.offsets is None:
        rows = torch.arange(len(codes.values), device=codes.values.device)
        return rows[:, None].expand_as(codes.values)
    counts = codes.offsets.diff()
    return torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)


@dataclass(frozen=True)
class TopExample:
    """A place where a feature is large: prompt, scheduler step, token, and its activation there."""

    prompt: int
    step: int
    token: int
    value: float


def top_examples(
    sae: Sae, store: ActivationStore, features: Sequence[int], count: int, *, batch: int = 4096
) -> dict[int, list[TopExample]]:
    """Return the largest activations of some features, at most one for each prompt, largest first.

    Raises:
        ValueError: a feature that is not there, or rows without prompts.
    """
    unknown = [f for f in features if not 0 <= f < sae.config.features]
    if unknown:
        raise ValueError(
            f"top_examples: expected features within [0, {sae.config.features}), got {unknown[0]}"
        )
    labels = store.labels(torch.arange(len(store)))
    if not len(store) or int(labels.prompt.min()) < 0:
        raise ValueError("top_examples: expected rows that know their prompts, got others")
    place = torch.full((sae.config.features,), -1)
    place[torch.tensor(list(features), dtype=torch.int64)] = torch.arange(len(features))
    prompts = int(labels.prompt.max()) + 1
    best = torch.zeros(len(features) * prompts)
    where = torch.full((len(features) * prompts,), -1)
    device = sae.w_enc.device
    for got in store.batches(batch, shuffle="off", labels=True, drop_last=False, device=device):
        assert got.labels is not None
        with torch.no_grad():
            codes = sae.encode(got.x.float(), step=got.step)
        indices = codes.indices.long().cpu().flatten()
        slot = torch.where(indices >= 0, place[indices.clamp(min=0)], -1)
        found = torch.nonzero(slot >= 0)[:, 0]
        row = rows_of(codes).cpu().flatten()[found]
        value = codes.values.cpu().flatten()[found]
        cell = slot[found] * prompts + got.labels.prompt[row]
        peak = torch.zeros_like(best).scatter_reduce(0, cell, value, "amax")
        at_peak = value == peak[cell]
        first = torch.full_like(where, len(store)).scatter_reduce(
            0, cell[at_peak], got.rows[row[at_peak]], "amin"
        )
        better = peak > best
        best, where = torch.where(better, peak, best), torch.where(better, first, where)
    made: dict[int, list[TopExample]] = {}
    for index, feature in enumerate(features):
        values = best[index * prompts : (index + 1) * prompts]
        ranked = torch.sort(values, descending=True, stable=True).indices[:count]
        numbers = [int(where[index * prompts + int(p)]) for p in ranked if values[p] > 0]
        made[int(feature)] = [
            TopExample(
                int(labels.prompt[n]),
                int(labels.step[n]),
                int(labels.token[n]),
                float(values[int(labels.prompt[n])]),
            )
            for n in numbers
        ]
    return made
