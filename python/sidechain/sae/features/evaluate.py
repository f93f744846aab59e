# SPDX-License-Identifier: Apache-2.0
"""Metrics of a dictionary on rows it was not trained on, and the top examples of its features."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..._errors import InputError
from ...store import Batches, BatchOptions, Labels
from ...store.protocol import RowReader
from ..model import Codes, Sae

#: Rows whose labels are held at once: 32 MiB.
LABELS = 1 << 20


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
        mean_square: of the activation of each feature over all rows [F], in normalised units.
    """

    rows: int
    fvu: float
    raw_fvu: float
    steps: Tensor
    step_fvu: Tensor
    l0: float
    dead: float
    density: Tensor
    mean_square: Tensor


def measure(sae: Sae, rows: RowReader, *, batch: int = 4096) -> Health:
    """Encode and reconstruct all rows of a reader, and return the metrics.

    Args:
        sae: an autoencoder.
        rows: a store, `ArrayRows`, or others that are read by number.
        batch: rows at a time.

    Raises:
        InputError: no rows, bad ones, those of another width, or a transcoder, whose targets they
            are not.
        ValueError: steps the dictionary does not know.
    """
    _check(sae, rows)
    device, features = sae.w_enc.device, sae.config.features
    steps = torch.unique(torch.cat([torch.unique(part.step) for part in labels_in_parts(rows)]))
    slots, width = len(steps), sae.config.d_in
    errors, squares, counts = (torch.zeros(slots, dtype=torch.float64) for _ in range(3))
    sums = torch.zeros(slots, width, dtype=torch.float64)
    fired = torch.zeros(features, dtype=torch.int64)
    energy = torch.zeros(features, dtype=torch.float64)
    for got in in_order(rows, batch, device):
        assert got.labels is not None
        x, step = got.x.float(), got.step if has_steps(rows) else None
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
        energy += _squares(codes, features)
    variance = squares - sums.square().sum(1) / counts
    scale = _scales(sae, steps if has_steps(rows) else None).square().expand(slots)
    return Health(
        rows=len(rows),
        fvu=float(errors.sum() / variance.sum()),
        raw_fvu=float((scale * errors).sum() / (scale * variance).sum()),
        steps=steps,
        step_fvu=errors / variance,
        l0=float(fired.sum() / len(rows)),
        dead=float((fired == 0).double().mean()),
        density=fired.double() / len(rows),
        mean_square=energy / len(rows),
    )


def labels_in_parts(rows: RowReader) -> Iterator[Labels]:
    """Yield the labels of all rows, so many at a time that a large file needs no more memory."""
    for start in range(0, len(rows), LABELS):
        yield rows.labels(np.arange(start, min(start + LABELS, len(rows))))


def has_steps(rows: RowReader) -> bool:
    """Return whether rows know their scheduler steps; those of a store do."""
    return bool(getattr(rows, "has_steps", True))


def _check(sae: Sae, rows: RowReader) -> None:
    if not len(rows):
        raise InputError("measure: expected a store with rows, got an empty one")
    if sae.config.transcoder:
        raise InputError("measure: expected an autoencoder, got a transcoder")
    if rows.width != sae.config.d_in:
        raise InputError(f"measure: expected rows of width {sae.config.d_in}, got {rows.width}")


def in_order(rows: RowReader, batch: int, device: torch.device) -> Batches:
    """Return all rows in batches, bad ones refused."""
    options = BatchOptions(batch, shuffle="off", labels=True, drop_last=False, on_bad_rows="error")
    return Batches(rows, options, device=device)


def _scales(sae: Sae, steps: Tensor | None) -> Tensor:
    entry = sae.normaliser.entry(None if steps is None else steps.to(sae.w_enc.device))
    return sae.normaliser.scale[entry].double().cpu()


def active_counts(codes: Codes, features: int) -> Tensor:
    """Return the number of rows in which each feature is active [F] int64."""
    live = codes.indices[(codes.indices >= 0) & (codes.values > 0)]
    return torch.bincount(live.long(), minlength=features)


def _squares(codes: Codes, features: int) -> Tensor:
    """Return the sum of the squared activations of each feature [F] float64."""
    live = (codes.indices >= 0) & (codes.values > 0)
    found = torch.zeros(features, dtype=torch.float64)
    return found.index_add_(
        0, codes.indices[live].long().cpu(), codes.values[live].double().square().cpu()
    )


def rows_of(codes: Codes) -> Tensor:
    """Return the row of every entry of sparse codes, in the shape of the values."""
    if codes.offsets is None:
        rows = torch.arange(len(codes.values), device=codes.values.device)
        return rows[:, None].expand_as(codes.values)
    counts = codes.offsets.diff()
    return torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
