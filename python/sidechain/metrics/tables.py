# SPDX-License-Identifier: Apache-2.0
"""CSV tables with named columns: strict reading, plain writing."""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TextIO

Cell = str | float
Row = dict[str, Cell]


def read_table(
    path: str | Path,
    *,
    text: Sequence[str] = (),
    numbers: Sequence[str] = (),
    blank_numbers: Sequence[str] = (),
    optional: Sequence[str] = (),
    name: str = "read_table",
) -> list[Row]:
    """Read the named columns of a CSV file; columns not named are ignored.

    Args:
        path: the file, UTF-8 with a header line; "-" reads standard input.
        text: columns kept as stripped, non-empty strings.
        numbers: columns of finite numbers.
        blank_numbers: columns of finite numbers where an empty cell (or "-", "nan") means undefined
            and becomes NaN.
        optional: columns kept as stripped strings, "" where there is none.
        name: what to call the reader in error messages.

    Returns:
        One dict per data line, in file order.

    Raises:
        ValueError: a column is missing or repeated, a cell is not what it should be, or no data
            line follows the header. The message names the line.
        OSError: the file cannot be read.
    """
    if str(path) == "-":
        return _parse(sys.stdin, "standard input", text, numbers, blank_numbers, optional, name)
    with open(path, newline="", encoding="utf-8-sig") as stream:
        try:
            return _parse(stream, str(path), text, numbers, blank_numbers, optional, name)
        except UnicodeDecodeError as error:
            raise ValueError(f"{name}: expected UTF-8 text in {path}, got {error.reason}") from None


def _parse(
    stream: TextIO,
    source: str,
    text: Sequence[str],
    numbers: Sequence[str],
    blank_numbers: Sequence[str],
    optional: Sequence[str],
    name: str,
) -> list[Row]:
    reader = csv.reader(stream)
    try:
        header = [cell.strip() for cell in next(reader, [])]
        wanted = [*text, *numbers, *blank_numbers]
        missing = [column for column in wanted if column not in header]
        repeated = sorted({column for column in (*wanted, *optional) if header.count(column) > 1})
        if missing or repeated:
            problem = f"without {', '.join(missing)}" if missing else f"twice {', '.join(repeated)}"
            raise ValueError(
                f"{name}: expected columns {','.join(wanted)} in {source}, "
                f"got {','.join(header) or 'an empty file'} ({problem})"
            )
        rows: list[Row] = []
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            where = f"line {reader.line_num} of {source}"
            if len(cells) != len(header):
                raise ValueError(
                    f"{name}: expected {len(header)} cells on {where}, got {len(cells)}"
                )
            row = dict(zip(header, (cell.strip() for cell in cells), strict=True))
            typed = _typed(row, text, numbers, blank_numbers, where, name)
            rows.append({**typed, **{column: row.get(column, "") for column in optional}})
    except csv.Error as error:
        raise ValueError(
            f"{name}: expected a CSV table, got {error} on line {reader.line_num} of {source}"
        ) from None
    if not rows:
        raise ValueError(f"{name}: expected at least one data line in {source}, got none")
    return rows


def _typed(
    row: Mapping[str, str],
    text: Sequence[str],
    numbers: Sequence[str],
    blank_numbers: Sequence[str],
    where: str,
    name: str,
) -> Row:
    typed: Row = {}
    for column in text:
        if not row[column]:
            raise ValueError(f"{name}: expected text in column {column} on {where}, got nothing")
        typed[column] = row[column]
    for column in (*numbers, *blank_numbers):
        cell = row[column]
        if column in blank_numbers and cell.lower() in {"", "-", "nan"}:
            typed[column] = math.nan
            continue
        try:
            value = float(cell)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise ValueError(
                f"{name}: expected a finite number in column {column} on {where}, got {cell!r}"
            )
        typed[column] = value
    return typed


def write_table(
    stream: TextIO, columns: Sequence[str], rows: Iterable[Mapping[str, object]]
) -> None:
    """Write rows as CSV: six decimals for floats, nothing for NaN, true/false for booleans."""
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow([_cell(row[column]) for column in columns])


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6f}"
    return str(value)
