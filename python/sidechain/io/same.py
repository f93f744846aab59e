# SPDX-License-Identifier: Apache-2.0
"""Comparison of settings and fingerprints of what a run depends on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: Bytes of a large file that its digest reads: at its start, at its end and between.
_SAMPLE, _SAMPLES = 1 << 20, 64


def plain(value: Any) -> Any:
    """Return a value as JSON has it, so that what was read back equals what was written."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, slice):
        parts = (value.start, value.stop, value.step)
        return ":".join("" if part is None else str(part) for part in parts)
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def difference(
    known: Mapping[str, Any], wanted: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
) -> tuple[str, Any, Any] | None:
    """Return the first setting in which two runs differ, as (name, known, wanted).

    Args:
        known: settings that were written.
        wanted: settings now.
        defaults: for a setting that the older version of `known` did not have; without a default
            there it differs.
    """
    old = {**plain(defaults or {}), **plain(known)}
    new = plain(wanted)
    for name in [*new, *(name for name in old if name not in new)]:
        if old.get(name) != new.get(name) or (name in old) != (name in new):
            return name, old.get(name), new.get(name)
    return None


def fingerprint(**facts: Any) -> str:
    """Return a digest of plain values, equal on every machine.

    Independent of the order of keys; floats count by their shortest exact text. Paths and numbers
    of threads must not be among the facts.
    """
    text = json.dumps(plain(facts), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def digest(path: str | Path) -> str:
    """Return SHA-256 of a file, or of the names and files of a folder: a path does not say them.

    Files of more than 64 MiB count by their length and 64 samples of 1 MiB, spread evenly.
    """
    start = Path(path)
    if start.is_file():
        return _file_digest(start)
    whole = hashlib.sha256()
    for file in sorted(p for p in start.rglob("*") if p.is_file()):
        whole.update(f"{file.relative_to(start).as_posix()}\0{_file_digest(file)}\n".encode())
    return whole.hexdigest()


def _file_digest(path: Path) -> str:
    size = path.stat().st_size
    if size <= _SAMPLE * _SAMPLES:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    found = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for number in range(_SAMPLES):
            file.seek((size - _SAMPLE) * number // (_SAMPLES - 1))
            found.update(file.read(_SAMPLE))
    return found.hexdigest()
