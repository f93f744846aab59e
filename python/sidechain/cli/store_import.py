# SPDX-License-Identifier: Apache-2.0
"""`sidechain store import`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import _values as values
from .._options import Settings, choice, path, text
from .builder import Command

#: Of `sidechain.store.importing`, and of `sidechain.store.finite`.
STORED, POLICIES = ("float32", "float16", "bfloat16"), ("error", "skip")


@dataclass(frozen=True, kw_only=True)
class StoreImportSettings(Settings):
    """Options of `sidechain store import`."""

    source: Path = path(
        ...,
        "file or folder of activations, one row each: .npy, .safetensors, .pt, .parquet, .arrow",
        "SOURCE",
        None,
        positional=True,
    )
    out: Path = path(
        ...,
        "folder of the store, new or empty",
        "OUT",
        values.folder_to_write,
        positional=True,
        replayed=False,
    )
    column: str | None = text(None, "of a table, or name of the tensor in a file", "NAME")
    steps: Path | None = path(
        None, ".npy file with the scheduler step of each row", "FILE", values.file_there
    )
    site: str = text("rows", "name of the site in the store", "NAME")
    dtype: str | None = choice(None, "of the rows on disk (default: as they are)", STORED)
    on_bad_rows: str = choice("error", "at a row that is not finite", POLICIES)


def run(settings: StoreImportSettings, given: Mapping[str, Any]) -> int:
    """Import and print what is in the store."""
    import torch

    from ..store import import_rows
    from .row_steps import read_steps

    store = import_rows(
        settings.source,
        settings.out,
        column=settings.column,
        steps=read_steps("--steps", settings.steps),
        site=settings.site,
        dtype=None if settings.dtype is None else getattr(torch, settings.dtype),
        on_bad_rows=settings.on_bad_rows,
    )
    skipped = store.provenance["skipped"]
    without = f", {skipped} bad left out" if skipped else ""
    print(f"{settings.out} {store.site}: {len(store)} rows of {store.width}{without}")
    return 0


COMMAND = Command(
    StoreImportSettings,
    run,
    "Write activations that another program saved into a store of one site, in their order. Every "
    "row is looked at before anything is written; the store appears whole or not at all. The same "
    "command continues an import that was cut off.",
)
