# SPDX-License-Identifier: Apache-2.0
"""Import rows of other programs into a store of one site: all of them or nothing.

Every row is looked at before anything is written. The store is built in a folder beside the place
it will have, `.NAME.import`, and takes that place when it is whole. An import that was cut off is
continued by the same call; one of other rows or settings starts anew.
"""

from __future__ import annotations

import os
import shutil
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from .._errors import InputError
from ..io.atomic import naming, sync_folder
from ..io.lock import Lock
from ..io.same import difference
from .arrays import ArrayRows
from .files import open_rows
from .finite import POLICIES, bad_rows
from .labels import Labels
from .manifest import COLUMNS, DTYPES, MANIFEST, Manifest
from .options import Storage
from .protocol import RowReader
from .reader import ActivationStore
from .shard import decode
from .writer import LOCK, ActivationWriter

#: Kinds of rows that an import may write.
STORED = tuple(name for name in DTYPES if name != "int8")
#: Name of the guidance branch of rows that come from none.
BRANCH = "rows"
_BLOCK = 8 << 20
_NAMES = {DTYPES[name]: name for name in STORED}


def import_rows(
    source: Any,
    out: str | os.PathLike[str],
    *,
    column: str | None = None,
    steps: Any = None,
    site: str = "rows",
    dtype: torch.dtype | None = None,
    on_bad_rows: str = "error",
    progress: bool = True,
) -> ActivationStore:
    """Write rows [N, d] of files, arrays or a reader into a store of one site, in their order.

    Label `token` of a row is its number in the source, `step` as given (0 where not known),
    `prompt` -1. The provenance of the store holds name, number and checksum of the rows, and how
    many bad ones were left out.

    Args:
        source: what `open_rows` and `ArrayRows` take, or rows that are read by number.
        out: folder of the store, not there yet or empty.
        column: see `open_rows`.
        steps: scheduler step of each row [N]; None = not known, or those that a reader has.
        site: name of the site.
        dtype: float16 | bfloat16 | float32 on disk; None = as the rows are.
        on_bad_rows: at a row that is not finite, or whose square is not: "error" refuses, "skip"
            leaves it out.
        progress: show progress bars, and say so where an import that was cut off goes on.

    Returns:
        The store.

    Raises:
        FileExistsError: something is at `out`.
        InputError: a bad row, or one that `dtype` cannot hold; its number is in the message.
        TypeError, ValueError: options, or from the source.
        RuntimeError: another import into `out` is at work, or the rows have changed meanwhile.
        OSError: a full disk; the same call goes on where this one ended.
    """
    if on_bad_rows not in POLICIES:
        raise ValueError(
            f"import_rows: expected on_bad_rows to be one of {', '.join(POLICIES)}, got "
            f"{on_bad_rows!r}"
        )
    place = Path(out)
    _check_free(place)
    reader = rows_reader(source, column=column, steps=steps)
    kind = dtype or (torch.float32 if reader.dtype == torch.int8 else reader.dtype)
    if kind not in _NAMES:
        raise TypeError(f"import_rows: expected dtype {' | '.join(STORED)}, got {kind!r}")
    scan = _scanned(reader, kind, on_bad_rows, progress)
    facts = {
        "source": "import",
        "name": str(getattr(reader, "name", "rows")),
        "column": column,
        "rows": len(reader),
        "skipped": scan.bad,
        "fingerprint": zlib.crc32(np.array(scan.checksums, dtype="<u4").tobytes()),
        "has_steps": bool(getattr(reader, "has_steps", True)),
        "site": site,
        "dtype": _NAMES[kind],
    }
    folder = _partial(place)
    _prepare(folder, facts, progress)
    _write(reader, folder, scan, kind, facts, progress)
    wanted, found = len(reader) - scan.bad, len(ActivationStore(folder, site))
    if found != wanted:
        raise RuntimeError(f"import_rows: expected {wanted} rows in {folder}, got {found}")
    with naming(place):
        os.replace(folder, place.resolve())
        sync_folder(place.resolve().parent)
    return ActivationStore(place, site)


def rows_reader(source: Any, *, column: str | None = None, steps: Any = None) -> RowReader:
    """Return a reader of the rows of a source.

    Args:
        source: a path or `datasets.Dataset` (`open_rows`); an array, a tensor or a list of them
            (`ArrayRows`); or a reader, as it is.
        column: see `open_rows`; of files and tables only.
        steps: of each row; a reader has its own.

    Raises:
        TypeError, ValueError: a store, which needs no import, or from the source.
    """
    table = hasattr(source, "with_format") and hasattr(source, "column_names")
    if isinstance(source, str | os.PathLike) or table:
        if not table and (Path(source) / MANIFEST).is_file():
            raise InputError(f"rows: expected rows of another program, got the store {source}")
        return open_rows(source, column=column, steps=steps)
    if column is not None:
        raise TypeError(f"rows: expected no column with rows in memory, got {column!r}")
    if isinstance(source, ActivationStore):
        raise InputError(f"rows: expected rows of another program, got the store {source.folder}")
    if hasattr(source, "gather") and hasattr(source, "labels"):
        if steps is not None:
            raise TypeError("rows: expected no steps with a reader that has labels, got some")
        reader: RowReader = source
        return reader
    return ArrayRows(source, steps=steps)


class _Scan(NamedTuple):
    """What a pass over the rows found: number of bad ones, CRC-32 of each block."""

    bad: int
    checksums: list[int]


class _Block(NamedTuple):
    """Rows [start, stop) of the source: x [n, d], labels, places of the bad ones, CRC-32."""

    start: int
    stop: int
    x: Tensor
    labels: Labels
    bad: NDArray[np.int64]
    checksum: int


def _blocks(reader: RowReader, first: int = 0) -> Iterator[_Block]:
    size = max(1, _BLOCK // reader.row_bytes)
    for start in range(first, len(reader), size):
        stop = min(start + size, len(reader))
        numbers = np.arange(start, stop, dtype=np.int64)
        stored = np.empty((len(numbers), reader.row_bytes), np.uint8)
        reader.gather(numbers, stored)
        labels = reader.labels(numbers)
        checksum = zlib.crc32(labels.step.numpy().data, zlib.crc32(stored.data))
        x = decode(torch.from_numpy(stored), reader.dtype, reader.width)
        yield _Block(start, stop, x, labels, bad_rows(x).numpy(), checksum)


def _scanned(reader: RowReader, dtype: torch.dtype, on_bad_rows: str, progress: bool) -> _Scan:
    """Look at every row before anything is written."""
    limits = {name: np.iinfo(COLUMNS[name]).max for name in ("step", "token")}
    bad, checksums = 0, []
    with tqdm(total=len(reader), desc="check", unit="row", disable=not progress) as bar:
        for block in _blocks(reader):
            if len(block.bad) and on_bad_rows == "error":
                raise InputError(
                    "import_rows: expected finite rows [and finite squares], got row "
                    f"{block.start + int(block.bad[0])}: set on_bad_rows to skip to leave such "
                    "rows out"
                )
            _check_holds(block, dtype)
            for name, most in limits.items():
                values = getattr(block.labels, name)
                if int(values.max()) > most:
                    row = block.start + int(values.argmax())
                    raise InputError(
                        f"import_rows: expected {name} <= {most} [what a store holds], got "
                        f"{int(values.max())} at row {row}"
                    )
            bad += len(block.bad)
            checksums.append(block.checksum)
            bar.update(block.stop - block.start)
    if bad == len(reader):
        raise InputError(f"import_rows: expected a row that is finite, got {bad} that are not")
    return _Scan(bad, checksums)


def _check_holds(block: _Block, dtype: torch.dtype) -> None:
    """Refuse a good row that is not finite in the dtype of the store."""
    if dtype == block.x.dtype or dtype == torch.float32:
        return
    lost = ~block.x.to(dtype).isfinite().all(1)
    lost[block.bad] = False
    if bool(lost.any()):
        place = int(lost.nonzero()[0, 0])
        raise InputError(
            f"import_rows: expected rows within {torch.finfo(dtype).max:g} [{_NAMES[dtype]}], got "
            f"{float(block.x[place].abs().max()):g} in row {block.start + place}: choose bfloat16 "
            "or float32"
        )


def _write(
    reader: RowReader,
    folder: Path,
    scan: _Scan,
    dtype: torch.dtype,
    facts: dict[str, Any],
    progress: bool,
) -> None:
    """Write the rows, from where an import that was cut off has ended."""
    site, storage = facts["site"], Storage(dtype)
    size = max(1, _BLOCK // reader.row_bytes)
    options: dict[str, Any] = {"branches": (BRANCH,), "mode": "resume", "provenance": facts}
    try:
        with ActivationWriter(folder, {site: reader.width}, storage, **options) as writer:
            first, count = writer.cursor, len(reader)
            if first and progress:
                tqdm.write(f"import: goes on at row {first} of {count}", file=sys.stderr)
            bar = tqdm(total=count, initial=first, desc="import", unit="row", disable=not progress)
            with bar:
                for block in _blocks(reader, first):
                    if block.checksum != scan.checksums[block.start // size]:
                        raise RuntimeError(
                            "import_rows: expected rows that stay as they are, got others than "
                            f"before from row {block.start} on"
                        )
                    with writer.transaction(cursor=block.stop):
                        _write_block(writer, site, block)
                    bar.update(block.stop - block.start)
    except OSError as error:
        if error.errno is None:
            raise
        there = (folder / MANIFEST).is_file()
        kept = Manifest.read(folder).sites[site].rows if there else 0
        text = f"{os.strerror(error.errno)}; {kept} rows are kept, the same import goes on"
        raise OSError(error.errno, text, str(folder)) from error


def _write_block(writer: ActivationWriter, site: str, block: _Block) -> None:
    keep = np.ones(len(block.x), dtype=np.bool_)
    keep[block.bad] = False
    whole = bool(keep.all())
    labels = {
        name: getattr(block.labels, name).numpy()[keep] for name in ("step", "prompt", "token")
    }
    rows = block.x if whole else block.x[torch.from_numpy(keep)]
    if len(rows):
        writer.write({site: rows}, **labels, copy=False)


# -- the place of the store -----------------------------------------------------------------------


def _check_free(place: Path) -> None:
    if (place / MANIFEST).is_file():
        raise FileExistsError(
            f"import_rows: expected a folder without a store as out, got the store {place}"
        )
    if place.is_dir() and any(place.iterdir()):
        raise FileExistsError(f"import_rows: expected an empty folder as out, got {place}")
    if place.exists() and not place.is_dir():
        raise FileExistsError(f"import_rows: expected a folder as out, got the file {place}")


def _partial(place: Path) -> Path:
    """Return the folder in which the store is built."""
    whole = place.resolve()
    return whole.with_name(f".{whole.name}.import")


def _prepare(folder: Path, facts: dict[str, Any], progress: bool) -> None:
    """Keep what an import that was cut off has written, if it is of the same rows and settings."""
    if not (folder / MANIFEST).is_file():
        return
    other = difference(Manifest.read(folder).provenance, facts)
    if other is None:
        return
    with Lock(folder / LOCK, "import_rows: expected to be the only one to import there"):
        shutil.rmtree(folder)
    if progress:
        name, there, now = other
        tqdm.write(
            f"import: starts anew, the one that was cut off had {name}={there!r}, not {now!r}",
            file=sys.stderr,
        )
