# SPDX-License-Identifier: Apache-2.0
"""`metrics.jsonl`: one line of strict JSON for each interval, whatever happened to the file."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from pathlib import Path
from typing import Any

from ...io.atomic import naming, write_atomic
from ...io.run_folder import nan_to_none


class MetricsFile:
    """Lines of metrics in ascending steps; they can be cut off at a checkpoint.

    Opening keeps the lines up to the step that is done and drops the rest: what a crashed run wrote
    after its checkpoint, halves of lines, steps that are there twice. Before each write it looks
    whether the file is still the one it knows, and opens it again if somebody removed or edited it.

    Args:
        path: of the file, made if it is not there.
        done: steps that the run has done.
        length: bytes of the file when that step was saved; where fewer are left, a warning says
            so. 0 = not known.

    Attributes:
        length: bytes of the file.

    Raises:
        OSError: it cannot be read or written; the message names it.
    """

    def __init__(self, path: Path, done: int, length: int = 0) -> None:
        self._path, self._descriptor = path, -1
        self._open(done, length)

    def _open(self, done: int, known: int) -> None:
        with naming(self._path):
            data = self._path.read_bytes() if self._path.exists() else b""
            kept, read = _lines(data, done)
            if read < known:
                warnings.warn(
                    f"{self._path}: expected {known} bytes up to step {done}, got {read}: lines of "
                    "these steps are missing; training goes on",
                    RuntimeWarning,
                    stacklevel=4,
                )
            if kept != data and not data.startswith(kept):
                write_atomic(self._path, kept)
            self.close()
            self._descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            if os.fstat(self._descriptor).st_size != len(kept):
                os.ftruncate(self._descriptor, len(kept))
        self.length, self._done = len(kept), done

    def _is_known(self) -> bool:
        ours = os.fstat(self._descriptor)
        try:
            there = os.stat(self._path)
        except FileNotFoundError:
            return False
        return os.path.samestat(ours, there) and there.st_size == self.length

    def write(self, line: dict[str, Any]) -> None:
        """Add a line, whole or not at all; values that are not finite become null.

        Args:
            line: JSON values, `step` among them.

        Raises:
            OSError: it cannot be written; the lines before are untouched.
        """
        text = json.dumps(nan_to_none(line), allow_nan=False).encode() + b"\n"
        if not self._is_known():
            self._open(self._done, self.length)
        with naming(self._path):
            try:
                left = memoryview(text)
                while left:
                    left = left[os.write(self._descriptor, left) :]
            except OSError:
                with contextlib.suppress(OSError):  # the rest of the line is cut off when opened
                    os.ftruncate(self._descriptor, self.length)
                raise
        self.length += len(text)
        self._done = int(line["step"])

    def sync(self) -> None:
        """Put the lines on disk."""
        with naming(self._path):
            os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file; a second time does nothing."""
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)


def _lines(data: bytes, done: int) -> tuple[bytes, int]:
    """Return the lines up to a step as strict JSON, and how many bytes of `data` they are."""
    kept, read, last = [], 0, 0
    for raw in data.split(b"\n"):
        row = _row(raw)
        if row is None or not last < row["step"] <= done:
            continue
        text = json.dumps(nan_to_none(row), allow_nan=False).encode()
        kept.append((raw if json.loads(text) == row else text) + b"\n")
        read += len(raw) + 1
        last = row["step"]
    return b"".join(kept), read


def _row(raw: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    step = row.get("step") if isinstance(row, dict) else None
    return row if isinstance(step, int) and not isinstance(step, bool) else None
