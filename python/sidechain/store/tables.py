# SPDX-License-Identifier: Apache-2.0
"""Rows in tables: Arrow and Parquet files and `datasets.Dataset`, by pyarrow where it is installed.

Rows are a column of lists of floats, nested for [n, ..., d], or float columns side by side.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .._errors import InputError


def arrow_arrays(file: Path, column: str | None) -> list[Any]:
    """Return the rows of an Arrow file or stream, views of the mapped file.

    Raises:
        InputError: no such column, or rows of another kind.
    """
    arrow = _pyarrow(file)
    mapped = arrow.memory_map(str(file))
    try:
        table = arrow.ipc.open_file(mapped).read_all()
    except arrow.ArrowInvalid:
        mapped.seek(0)
        table = arrow.ipc.open_stream(mapped).read_all()
    return _columns(table, column, file)


def parquet_arrays(file: Path, column: str | None) -> list[Any]:
    """Return the rows of a Parquet file, held in memory.

    Raises:
        InputError: no such column, or rows of another kind.
    """
    _pyarrow(file)
    from pyarrow import parquet

    found = parquet.ParquetFile(file)
    names = None if column is None else [chosen(found.schema_arrow.names, column, file)]
    return _columns(found.read(columns=names), column, file)


def _pyarrow(where: Any) -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
    except ModuleNotFoundError:
        raise InputError(
            f"rows: expected pyarrow to read {where}, got none: pip install pyarrow"
        ) from None
    return pyarrow


def dataset_arrays(dataset: Any, column: str | None) -> list[Any]:
    """Return the arrays of a `datasets.Dataset`, its selection and order applied.

    Raises:
        TypeError: no dataset that is read by number.
        InputError: several datasets, one with a transform, no such column, or rows of another kind.
    """
    if isinstance(dataset, Mapping) and hasattr(dataset, "column_names"):
        raise InputError(
            f"rows: expected one dataset, got {type(dataset).__name__} of "
            f"{', '.join(map(str, dataset))}: choose one"
        )
    if not hasattr(_table(dataset), "column_names"):
        raise TypeError(
            "rows: expected a path or a datasets.Dataset [read by number; a stream is given as an "
            f"iterable of its tensors], got {type(dataset).__name__}"
        )
    if getattr(dataset, "_format_type", None) == "custom":
        raise InputError(
            "rows: expected a dataset without a transform [rows are read from its table, where it "
            "is not applied], got one: map it first"
        )
    if getattr(dataset, "_indices", None) is not None:
        dataset = dataset.flatten_indices()
    return _columns(_table(dataset), column, "the dataset")


def _table(dataset: Any) -> Any:
    found = getattr(dataset, "data", None)
    return getattr(found, "table", found)


def _columns(table: Any, column: str | None, where: Any) -> list[Any]:
    """Return a column of lists as matrices, or the float columns of a table as one."""
    import pyarrow

    lists = [n for n in table.column_names if _is_list(pyarrow, table.schema.field(n).type)]
    if column is None and not lists:
        floats = [
            n for n in table.column_names if pyarrow.types.is_floating(table.schema.field(n).type)
        ]
        if len(floats) != len(table.column_names) or not floats:
            raise InputError(
                f"rows: expected a column of lists of floats, or float columns alone, in {where}, "
                f"got {', '.join(f'{f.name} {f.type}' for f in table.schema)[:200]}"
            )
        for name in floats:
            table[name].validate(full=True)
        holes = [name for name in floats if table[name].null_count]
        if holes:
            raise InputError(f"rows: expected no missing values in {where}, got some in {holes[0]}")
        return [np.stack([table[name].to_numpy() for name in floats], axis=1)]
    name = chosen(lists if column is None else table.column_names, column, where)
    return [_matrix(pyarrow, chunk, f"{name} of {where}") for chunk in table[name].chunks]


def _is_list(arrow: Any, kind: Any) -> bool:
    kind = getattr(kind, "storage_type", kind)
    types = arrow.types
    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _matrix(arrow: Any, values: Any, what: str) -> Any:
    """Return a chunk of lists of equal length as an array [n, ..., d], without a copy."""
    values.validate(full=True)  # offsets that lead outside end the process where they are followed
    shape = [len(values)]
    values = getattr(values, "storage", values)
    while _is_list(arrow, values.type):
        if values.null_count:
            raise InputError(f"rows: expected no missing values in {what}, got some")
        count = len(values)
        inner = values.flatten()
        width = len(inner) // count if count else 0
        if not arrow.types.is_fixed_size_list(values.type) and count:
            lengths = np.diff(values.offsets.to_numpy())
            if (lengths != width).any():
                raise InputError(
                    f"rows: expected lists of one length in {what}, got {lengths.min()} to "
                    f"{lengths.max()}"
                )
        shape.append(width)
        values = inner
    if len(shape) == 1 or values.null_count:
        got = str(values.type) if len(shape) == 1 else "missing values"
        raise InputError(f"rows: expected lists of floats in {what}, got {got}")
    return values.to_numpy(zero_copy_only=True).reshape(shape)


def chosen(names: list[str], column: str | None, where: Any) -> str:
    """Return the name of a column or tensor that is asked for; that of the only one by default.

    Raises:
        InputError: it is not there, or none is asked for of several.
    """
    if column is None and len(names) == 1:
        return names[0]
    if column is None or column not in names:
        known = ", ".join(sorted(names)[:12]) or "none"
        got = "none" if column is None else repr(column)
        raise InputError(f"rows: expected column to be one of {known} [in {where}], got {got}")
    return column
