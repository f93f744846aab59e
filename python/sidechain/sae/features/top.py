# SPDX-License-Identifier: Apache-2.0
"""The rows in which features of a dictionary are largest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..._errors import InputError
from ...store import Batch
from ...store.protocol import RowReader
from ..model import Sae
from .evaluate import has_steps, in_order, labels_in_parts, rows_of


@dataclass(frozen=True)
class TopExample:
    """A row in which a feature is large.

    Attributes:
        prompt: number of its prompt, -1 where not known.
        step: scheduler step; 0 where not known.
        token: number of the token within its sample; of rows without labels that of the row.
        value: activation of the feature.
        row: number of the row.
    """

    prompt: int
    step: int
    token: int
    value: float
    row: int


def top_examples(
    sae: Sae, rows: RowReader, features: Sequence[int], count: int, *, batch: int = 4096
) -> dict[int, list[TopExample]]:
    """Return the rows with the largest activations of some features, largest first.

    At most one of each prompt; of rows without prompts any. Of equal activations the row with the
    lower number is first.

    Args:
        sae: the dictionary.
        rows: a store, `ArrayRows`, or others that are read by number.
        features: their numbers.
        count: rows of each.
        batch: rows at a time.

    Raises:
        ValueError: a feature that is not there, rows of which only some know their prompts, or
            those that `measure` refuses.
    """
    unknown = [f for f in features if not 0 <= f < sae.config.features]
    if unknown:
        raise ValueError(
            f"top_examples: expected features within [0, {sae.config.features}), got {unknown[0]}"
        )
    if not len(rows):
        raise InputError("top_examples: expected rows, got none")
    prompts = _have_prompts(rows)
    place = torch.full((sae.config.features,), -1)
    place[torch.tensor(list(features), dtype=torch.int64)] = torch.arange(len(features))
    best = _Best(len(features), count)
    for got in in_order(rows, batch, sae.w_enc.device):
        slot, row, value = _active(sae, got, place, steps=has_steps(rows))
        assert got.labels is not None
        number = got.rows[row]
        # A row without a prompt stands for itself.
        best.add(slot, number, value, got.labels.prompt[row] if prompts else number)
    return {int(f): _labelled(rows, best.of(index)) for index, f in enumerate(features)}


def _have_prompts(rows: RowReader) -> bool:
    known = sum(int((part.prompt >= 0).sum()) for part in labels_in_parts(rows))
    if known not in (0, len(rows)):
        raise InputError(
            "top_examples: expected rows that all know their prompts, or none of which does, got "
            "some of each"
        )
    return known > 0


def _labelled(rows: RowReader, found: list[tuple[int, float]]) -> list[TopExample]:
    labels = rows.labels(np.array([number for number, _ in found], dtype=np.int64))
    columns = zip(labels.prompt.tolist(), labels.step.tolist(), labels.token.tolist(), strict=True)
    return [
        TopExample(prompt, step, token, value, number)
        for (prompt, step, token), (number, value) in zip(columns, found, strict=True)
    ]


def _active(sae: Sae, got: Batch, place: Tensor, *, steps: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return (slot, row of the batch, value) of the codes of the features asked for."""
    with torch.no_grad():
        codes = sae.encode(got.x.float(), step=got.step if steps else None)
    indices = codes.indices.long().cpu().flatten()
    slot = torch.where(indices >= 0, place[indices.clamp(min=0)], -1)
    values = codes.values.cpu().flatten()
    found = torch.nonzero((slot >= 0) & (values > 0))[:, 0]
    row = rows_of(codes).cpu().flatten()[found]
    return slot[found], row, values[found]


class _Best:
    """The largest values of each slot, one of each group."""

    def __init__(self, slots: int, count: int) -> None:
        self._count, self._slots = count, slots
        empty = torch.zeros(0, dtype=torch.int64)
        self._kept = (empty, empty.clone(), torch.zeros(0), empty.clone())

    def add(self, slot: Tensor, row: Tensor, value: Tensor, group: Tensor) -> None:
        """Add rows, whose numbers ascend from call to call."""
        parts = (slot, row, value, group)
        columns = [torch.cat([old, new]) for old, new in zip(self._kept, parts, strict=True)]
        # Largest first within a slot; the sorts are stable and rows come in ascending order.
        order = torch.sort(columns[1], stable=True).indices
        order = order[torch.sort(columns[2][order], descending=True, stable=True).indices]
        order = order[torch.sort(columns[0][order], stable=True).indices]
        columns = [column[order] for column in columns]
        keep = _first_of_each(columns[0], columns[3])
        columns = [column[keep] for column in columns]
        starts = torch.searchsorted(columns[0], torch.arange(self._slots))
        rank = torch.arange(len(columns[0])) - starts[columns[0]]
        self._kept = tuple(column[rank < self._count] for column in columns)  # type: ignore[assignment]

    def of(self, slot: int) -> list[tuple[int, float]]:
        """Return (row, value) of a slot, largest first."""
        mine = self._kept[0] == slot
        return list(zip(self._kept[1][mine].tolist(), self._kept[2][mine].tolist(), strict=True))


def _first_of_each(slot: Tensor, group: Tensor) -> Tensor:
    """Return a mask of the first entry of every (slot, group)."""
    pairs = torch.stack([slot, group], 1)
    _, which = torch.unique(pairs, dim=0, return_inverse=True)
    first = torch.full((int(which.max()) + 1 if len(which) else 0,), len(which))
    first = first.scatter_reduce(0, which, torch.arange(len(which)), "amin")
    keep = torch.zeros(len(which), dtype=torch.bool)
    keep[first] = True
    return keep
