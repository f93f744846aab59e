# SPDX-License-Identifier: Apache-2.0
"""What `sidechain sae train` makes of its options."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..sae.config import SELECTING, SaeConfig
from ..sae.training.sources import Source, StoreSource
from ..sae.training.train_config import TrainConfig
from ..store import ActivationStore

#: Settings that have an option of their own.
_OWN = frozenset({"tokens", "batch", "lr", "sparsity", "seed"})


def settings(pairs: Sequence[str]) -> dict[str, Any]:
    """Read NAME=VALUE of `TrainConfig`; values as in JSON, words without quotes.

    Raises:
        ValueError: no such setting, or not a pair.
    """
    known = {f.name for f in fields(TrainConfig)} - _OWN
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or name not in known:
            raise ValueError(
                f"--set: expected NAME=VALUE with a name of {', '.join(sorted(known))}, got "
                f"{pair!r}"
            )
        try:
            value = json.loads({"none": "null"}.get(text.lower(), text))
        except ValueError:
            value = text
        found[name] = tuple(value) if isinstance(value, list) else value
    return found


def source(
    data: str,
    *,
    site: str | None,
    target: str | None,
    seed: int,
    live: Callable[[], Source],
) -> Source:
    """Open a store, or make the source of a site.

    Args:
        data: folder of a store, or a site.
        site: of the store.
        target: site of the output of a transcoder.
        seed: of the order.
        live: makes the source of a site.

    Raises:
        FileNotFoundError: a path without a store.
        ValueError: what the store or the site says.
    """
    if Path(data).is_dir() or "/" in data or "\\" in data:
        store = ActivationStore(data, site)
        aim = None if target is None else ActivationStore(data, target)
        return StoreSource(store, aim, seed=seed)
    if site is not None:
        raise ValueError(f"--site: expected a store beside it, got the site {data!r}")
    return live()


def config(source: Source, *, architecture: str, features: str, k: int | None) -> SaeConfig:
    """Return the dictionary that the options describe.

    Args:
        source: what sets the widths.
        architecture: one of `ARCHITECTURES`.
        features: a number, or a multiple of the width such as "8x".
        k: features per token; None = 32 where there is such a number.
    """
    d_in, d_out = source.widths()
    match = re.fullmatch(r"(\d+)(x?)", features.strip())
    if match is None or int(match[1]) < 1:
        raise ValueError(f"--features: expected N or Nx, got {features!r}")
    count = int(match[1]) * (d_in if match[2] else 1)
    aimed = bool(source.provenance().target_site)
    if k is None and architecture in SELECTING:
        k = min(32, count)
    return SaeConfig(
        d_in, count, architecture, k=k, d_out=d_out if aimed else None, transcoder=aimed
    )


def slug(source: Source) -> str:
    """Return the name of a source's site as a part of a path."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", source.provenance().site) or "site"
