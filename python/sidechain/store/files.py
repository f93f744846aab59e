# SPDX-License-Identifier: Apache-2.0
"""Open files of activations that other programs wrote as rows: mapped where the format allows it.

| files               | read how                                                                  |
|---------------------|---------------------------------------------------------------------------|
| .npy                | mapped                                                                    |
| .safetensors        | mapped; `column` names the tensor where there are several                 |
| .pt, .pth           | mapped; tensors only, no code is run; `column` names one of a dictionary  |
| .arrow, .feather    | mapped where not compressed: a column of lists; float columns are copied  |
| .parquet            | held in memory: its pages are compressed                                  |
| folder              | files of one of these kinds, in natural order (2 before 10); notes (.json, |
|                     | .txt, .md, .yaml) may lie beside them, others are named in a warning      |
| `datasets.Dataset`  | as .arrow                                                                 |
"""

from __future__ import annotations

import os
import pickle
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from .._errors import InputError
from .arrays import ArrayRows
from .tables import arrow_arrays, chosen, dataset_arrays, parquet_arrays

#: Kinds of files that describe others; they may lie in a folder of rows.
_NOTES = (".json", ".txt", ".md", ".yaml", ".yml")


def open_rows(source: Any, *, column: str | None = None, steps: Any = None) -> ArrayRows:
    """Open rows that are in files.

    Args:
        source: a file, a folder of files of one kind, or a `datasets.Dataset`.
        column: of a table, or name of the tensor in a file of several.
        steps: scheduler step of each row, see `ArrayRows`.

    Raises:
        FileNotFoundError: nothing there.
        InputError: another or a damaged kind of file, a column that is not there, or pyarrow is
            needed and not installed.
        TypeError: neither a path nor a dataset that is read by number.
        TypeError, ValueError: see `ArrayRows`.
    """
    if not isinstance(source, str | os.PathLike):
        return ArrayRows(dataset_arrays(source, column), steps=steps, name="dataset")
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"rows: expected a file or folder, got nothing at {path}")
    files = _in_folder(path) if path.is_dir() else [path]
    read = _reader(files[0])
    arrays: list[Any] = []
    for file in files:
        arrays += _read(read, file, column)
    return ArrayRows(arrays, steps=steps, name=path.name)


def _read(read: Callable[[Path, str | None], list[Any]], file: Path, column: str | None) -> Any:
    """Return the arrays of a file.

    Raises:
        InputError: damaged, or too large to be held where it cannot be mapped.
    """
    try:
        return read(file, column)
    except (InputError, ImportError):
        raise
    except MemoryError as error:
        raise InputError(
            f"rows: expected a {file.suffix} file that fits into memory, got {file}: {error}"
        ) from None
    except Exception as error:  # what a damaged file makes NumPy, torch and pyarrow raise is open
        if isinstance(error, OSError) and error.filename is not None:
            raise
        text = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(
            f"rows: expected an intact {file.suffix} file, got {file}: {text}"
        ) from None


def _in_folder(folder: Path) -> list[Path]:
    """Return the files of a folder, all of one kind that can be read."""
    found = [p for p in folder.iterdir() if not p.name.startswith(".")]
    files = sorted((p for p in found if p.suffix in _READERS), key=_natural)
    other = sorted(p.name for p in found if p.suffix not in _READERS)
    kinds = sorted({p.suffix for p in files})
    if len(kinds) != 1:
        got = ", ".join(kinds) if kinds else ", ".join(other[:5]) or "an empty one"
        raise InputError(
            f"rows: expected a folder with files of one of {', '.join(_READERS)}, got {got} in "
            f"{folder}"
        )
    deeper = [p.name for p in found if p.is_dir()]
    if deeper:
        raise InputError(
            f"rows: expected a folder without folders in it, got {sorted(deeper)[0]} in {folder}"
        )
    left = [name for name in other if Path(name).suffix.lower() not in _NOTES]
    if left:
        warnings.warn(
            f"rows: {len(left)} files of {folder} are not read [not {kinds[0]}]: "
            f"{', '.join(left[:5])}",
            RuntimeWarning,
            stacklevel=3,
        )
    return files


def _natural(path: Path) -> list[tuple[int, int, str]]:
    parts = re.split(r"(\d+)", path.name)
    return [(1, int(p), "") if p.isdigit() else (0, 0, p) for p in parts]


def _reader(file: Path) -> Callable[[Path, str | None], list[Any]]:
    if file.suffix not in _READERS:
        raise InputError(
            f"rows: expected a file of {', '.join(_READERS)}, or a folder of them, got {file}"
        )
    return _READERS[file.suffix]


def _npy(file: Path, column: str | None) -> list[Any]:
    _no_column(file, column)
    return [np.load(file, mmap_mode="r", allow_pickle=False)]


def _no_column(file: Path, column: str | None) -> None:
    if column is not None:
        raise InputError(f"rows: expected no column with {file} [one array], got {column!r}")


def _safetensors(file: Path, column: str | None) -> list[Any]:
    with safe_open(file, framework="pt") as opened:
        name = chosen(list(opened.keys()), column, file)
        return [opened.get_tensor(name)]


def _pickled(file: Path, column: str | None) -> list[Any]:
    try:
        content = _restricted(file)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"rows: expected an intact file of tensors alone, got {file} [a pickle that runs code "
            f"is not opened]: {' '.join(str(error).split())[-160:]}"
        ) from None
    if isinstance(content, Mapping):
        tensors = {str(name): one for name, one in content.items() if isinstance(one, Tensor)}
        return [tensors[chosen(list(tensors), column, file)]]
    _no_column(file, column)
    found = list(content) if isinstance(content, list | tuple) else [content]
    if not found or not all(isinstance(one, Tensor) for one in found):
        raise InputError(f"rows: expected tensors in {file}, got {type(content).__name__}")
    return found


def _restricted(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # no zip file, as of torch before 1.6: it cannot be mapped
        return torch.load(file, map_location="cpu", weights_only=True)


_READERS: dict[str, Callable[[Path, str | None], list[Any]]] = {
    ".npy": _npy,
    ".safetensors": _safetensors,
    ".pt": _pickled,
    ".pth": _pickled,
    ".parquet": parquet_arrays,
    ".arrow": arrow_arrays,
    ".feather": arrow_arrays,
}
