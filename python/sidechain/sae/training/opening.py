# SPDX-License-Identifier: Apache-2.0
"""Open whatever holds rows as a source, and check that it fits what is to be trained."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..._errors import InputError
from ...store import ActivationStore, ArrayRows, split
from ...store.importing import rows_reader
from ...store.manifest import MANIFEST
from ...store.protocol import RowReader
from ..config import SaeConfig
from .checkpoint import Checkpoint
from .options import DataOptions
from .rows import Rows, as_rows
from .sources import ArraySource, Source, StoreSource
from .streams import IterableSource
from .train_config import TrainConfig


def source_of(data: Any, options: DataOptions) -> tuple[Source, RowReader | None]:
    """Return the source of some rows, and the rows held out of it.

    Args:
        data: see `train`.
        options: how to read it.

    Raises:
        TypeError: nothing that holds rows, or options that such data does not take.
        ValueError: from the data.
    """
    if hasattr(data, "normalisers"):
        _none_of(options, "a Source", "target", "steps", "column", "buffer", "epochs", "held_out")
        return data, None
    found = readers_of(data, options)
    if found is None:
        _none_of(options, "a stream", "target", "steps", "column", "held_out")
        stream = IterableSource(
            data, epochs=options.epochs or 1, buffer=options.buffer, seed=options.seed
        )
        return stream, None
    _none_of(options, "rows that are read by number", "buffer")
    reader, target = found
    order: dict[str, Any] = {"seed": options.seed, "shuffle": options.shuffle}
    if options.held_out:
        if target is not None:
            raise NotImplementedError("train: expected no target with held_out, got one")
        rest, held_out = split(reader, options.held_out, seed=options.seed)
        origin = None
        if isinstance(reader, ActivationStore):
            origin = StoreSource(reader).provenance()
        return ArraySource(rest, origin=origin, epochs=options.epochs or 1, **order), held_out
    if isinstance(reader, ActivationStore) and isinstance(target, ActivationStore | None):
        return StoreSource(reader, target, epochs=options.epochs, **order), None
    return ArraySource(reader, target, epochs=options.epochs or 1, **order), None


def readers_of(data: Any, options: DataOptions) -> tuple[RowReader, RowReader | None] | None:
    """Return readers of the rows and of their targets; None where they only come as a stream.

    Raises:
        TypeError, ValueError: nothing that holds rows.
    """
    reader, target = _reader(data, options)
    if reader is None:
        return None
    if options.target is not None:
        target, further = _reader(options.target, DataOptions(steps=options.steps))
        if target is None or further is not None:
            raise TypeError(
                "train: expected a target that is read by number, got "
                f"{type(options.target).__name__}"
            )
    return reader, target


def _reader(data: Any, options: DataOptions) -> tuple[Any, RowReader | None]:
    steps, column = options.steps, options.column
    if isinstance(data, ActivationStore):
        _none_of(options, "an open store", "steps", "column")
        return data, None
    if _is_path(data) and (Path(data) / MANIFEST).is_file():
        _none_of(options, "a store", "steps")
        return ActivationStore(data, column), None
    if isinstance(data, list | tuple) and len(data):
        _none_of(options, "rows in memory", "column")
        return _listed(data, steps)
    reader = hasattr(data, "gather") and hasattr(data, "fingerprint")
    table = hasattr(data, "with_format") and hasattr(data, "column_names")
    if _is_path(data) or reader or table or isinstance(data, Tensor | np.ndarray):
        return rows_reader(data, column=column, steps=steps), None
    if isinstance(data, Iterable) or callable(data):
        return None, None
    raise TypeError(
        "train: expected rows [a tensor, an array, a file or folder, a store, a DataLoader or "
        f"another iterable], got {type(data).__name__}"
    )


def _is_path(data: Any) -> bool:
    return isinstance(data, str | os.PathLike)


def _listed(data: Sequence[Any], steps: Any) -> tuple[ArrayRows, RowReader | None]:
    """Return readers of a list of arrays, or of pairs (x, step) or `Rows`."""
    items = [data] if isinstance(data, Rows) else list(data)
    if all(isinstance(item, Tensor | np.ndarray) for item in items):
        return ArrayRows(items, steps=steps), None
    rows = [as_rows(item, number) for number, item in enumerate(items)]
    for name in ("step", "target"):
        has = [getattr(one, name) is not None for one in rows]
        if any(has) != all(has):
            raise InputError(
                f"train: expected a {name} in every item or in none, got none in item "
                f"{has.index(False)}"
            )
    labels = None
    if rows[0].step is not None:
        labels = np.concatenate([one.step.cpu().numpy() for one in rows if one.step is not None])
    targets = [one.target for one in rows if one.target is not None]
    return (
        ArrayRows([one.x for one in rows], steps=steps if labels is None else labels),
        ArrayRows(targets, steps=labels) if targets else None,
    )


def _none_of(options: DataOptions, what: str, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        if value is not None and value != 0:
            raise TypeError(f"train: expected no {name} with {what}, got {value!r}"[:200])


# -- what a source says of itself -----------------------------------------------------------------


def available(source: Source, batch: int) -> int | None:
    """Return how many rows a source has in whole batches; None = nobody knows, or without end."""
    asked: Callable[[int], int | None] | None = getattr(source, "available", None)
    return None if asked is None else asked(batch)


def targeted(source: Source) -> bool:
    """Return whether the rows of a source have a target."""
    asked: Callable[[], bool] | None = getattr(source, "targeted", None)
    if asked is not None:
        return asked()
    d_in, d_out = source.widths()
    return d_in != d_out or bool(source.provenance().target_site)


def check_source(config: SaeConfig, train: TrainConfig, source: Source) -> None:
    """Check that a source fits a dictionary and its training.

    Raises:
        InputError, ValueError, NotImplementedError: it does not.
    """
    widths = source.widths()
    if widths != (config.d_in, config.width_out):
        raise ValueError(
            f"Trainer: expected rows of widths {config.d_in} and {config.width_out} [d_in, "
            f"d_out], got {widths[0]} and {widths[1]}"
        )
    if targeted(source) != config.transcoder:
        wanted, got = ("a target", "none") if config.transcoder else ("no target", "one")
        raise InputError(
            f"Trainer: expected rows with {wanted} [transcoder={config.transcoder}], got {got}"
        )
    count = available(source, train.batch)
    if count == 0:
        raise InputError(
            f"Trainer: expected at least {train.batch} rows [one batch], got fewer: set batch"
        )
    if count is not None and count < train.tokens // train.batch * train.batch:
        raise InputError(
            f"Trainer: expected tokens <= {count} [rows in whole batches], got {train.tokens}: set "
            "epochs to go through them again"
        )
    if train.on_bad_rows == "skip" and not hasattr(source, "bad_rows"):
        raise NotImplementedError(
            "Trainer: expected on_bad_rows='error' [this source does not leave rows out], got "
            "'skip'"
        )


def check_stream(source: Source, found: Checkpoint) -> None:
    """Tell a stream what the rows before a checkpoint were, to compare when they come again."""
    if isinstance(source, IterableSource):
        source.expect(found.step, found.manifest.get("stream"))
