# SPDX-License-Identifier: Apache-2.0
"""`train`: a dictionary from rows of any kind, in one call."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..architectures.registry import ARCHITECTURES
from ..config import DEFAULT_K, SaeConfig
from ..model import Sae
from ..starting import opened, shaped
from .mesh import Mesh
from .opening import available, source_of, targeted
from .options import DataOptions, RunOptions
from .run_record import recorded_batch
from .sources import Source
from .train_config import TrainConfig, default_batch
from .trainer import Trainer


def train(
    data: Any,
    out: str | os.PathLike[str],
    *,
    features: int | None = None,
    tokens: int | None = None,
    mesh: Mesh | None = None,
    device: Any = None,
    **settings: Any,
) -> Sae:
    """Train a dictionary, or go on with the run in `out`.

    Args:
        data: rows: a tensor, NumPy array or memmap [..., d], or several; a file or folder of them
            (.npy, .safetensors, .pt, .parquet, .arrow); a store or its folder; a
            `datasets.Dataset`; a `DataLoader` or anything `IterableSource` takes; or a `Source`.
        out: folder of the run; see `Trainer`.
        features: F; None = those of the dictionary that it starts from.
        tokens: rows to train on; None = all of them, `epochs` times.
        mesh: see `Mesh`.
        device: see `Trainer`.
        **settings: of `SaeConfig` (architecture, k, prefixes, ...), `TrainConfig` (lr, batch, ...),
            `DataOptions` (target, steps, epochs, held_out, ...) and `RunOptions` (progress, ...).

    Raises:
        TypeError, ValueError, NotImplementedError: settings or rows that do not fit.
    """
    shape, training, reading, running = _sorted(settings)
    start = running.get("start")
    if start is not None:
        running["start"] = start = opened(start)
    source, held_out = source_of(data, DataOptions(**reading, seed=training.get("seed", 0)))
    batch = training["batch"] = training.get("batch", 0) or recorded_batch(Path(out))
    return Trainer(
        config_for(source, features, None if start is None else start.sae, **shape),
        TrainConfig(tokens=whole_run(source, batch) if tokens is None else tokens, **training),
        source,
        out,
        mesh=mesh,
        device=device,
        held_out_rows=held_out,
        **running,
    ).run()


def _sorted(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Sort settings by the class they belong to.

    Raises:
        TypeError: one that none of them has.
    """
    classes = (SaeConfig, TrainConfig, DataOptions, RunOptions)
    names = [{f.name for f in fields(kind)} for kind in classes]
    names[2].discard("seed")  # that of the training
    unknown = settings.keys() - set().union(*names)
    if unknown:
        raise TypeError(
            f"train: expected settings of {', '.join(kind.__name__ for kind in classes)}, got "
            f"{min(unknown)}"
        )
    return [{n: settings[n] for n in settings if n in known} for known in names]


def whole_run(source: Source, batch: int) -> int:
    """Return the rows of a source in whole batches.

    Args:
        source: rows.
        batch: rows of a step; 0 = those that fit so many, see `TrainConfig.batch`.

    Raises:
        TypeError: nobody knows how many there are.
    """
    count = available(source, 1)
    if count is None:
        raise TypeError(
            "train: expected tokens [rows to train on; these do not say how many they are], got "
            "none"
        )
    batch = batch or default_batch(count)
    return max(available(source, batch) or 0, batch)


def config_for(
    source: Source, features: int | None, start: Sae | None = None, **shape: Any
) -> SaeConfig:
    """Return the dictionary that fits the rows of a source: its widths, and k where it needs one.

    Args:
        source: rows.
        features: F; None = those of `start`.
        start: a dictionary to start from: what is not said is as it has it.
        **shape: of `SaeConfig`; k = None is 32, or F if that is less.

    Raises:
        TypeError: neither features nor a dictionary to start from.
        InputError: what a started run cannot change.
    """
    if start is not None:
        return shaped(start, {**shape, "features": features})
    if features is None:
        raise TypeError("train: expected features [F], or a dictionary to start from, got neither")
    d_in, d_out = source.widths()
    shape.setdefault("transcoder", targeted(source))
    if shape["transcoder"] or d_out != d_in:
        shape.setdefault("d_out", d_out)
    kind = ARCHITECTURES.get(shape.get("architecture", SaeConfig.architecture))
    if kind is not None and kind.takes("k") and shape.get("k") is None:
        shape["k"] = min(DEFAULT_K, features)
    return SaeConfig(d_in, features, **shape)
