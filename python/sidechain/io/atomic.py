# SPDX-License-Identifier: Apache-2.0
"""Atomic writes: a file is complete or absent."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

#: `.NAME.XXXXXXXX.part`, as `replacing` calls a file until it is whole.
_PARTIAL = re.compile(r"\.(.+)\.[a-z0-9_]{8}\.part")


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], *, parents: bool = False) -> Iterator[Path]:
    """Yield a temporary file beside `path`; it takes its place once the block is left.

    For what is written by a library or in pieces; `parents` makes the folder if it is missing.

    Raises:
        OSError: the place cannot be written; it names `path`, and what was there is untouched.
    """
    target = Path(path)
    with naming(target):
        if parents:
            target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(
            dir=target.parent, prefix=f".{target.name}.", suffix=".part"
        )
        os.close(handle)
    temporary = Path(name)
    try:
        with naming(target):
            yield temporary
            sync_file(temporary)
            # mkstemp is private to its owner; the result is an ordinary file.
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(temporary, 0o666 & ~umask)
            os.replace(temporary, target)
            sync_folder(target.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an OSError of the block name `path`; a full disk names none, or a temporary file."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


def write_atomic(path: str | os.PathLike[str], data: bytes, *, parents: bool = False) -> Path:
    """Write a file so that a reader, a crash or a full disk never sees half of it.

    Raises:
        OSError: the place cannot be written; it names the file, and what was there is untouched.
    """
    with replacing(path, parents=parents) as temporary, open(temporary, "wb") as file:
        file.write(data)
    return Path(path)


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write a text file in UTF-8, whole or not at all; its folder is made if it is missing."""
    return write_atomic(path, text.encode("utf-8"), parents=True)


def remove_partial(folder: Path, ours: Callable[[str], bool]) -> list[Path]:
    """Remove what `replacing` leaves in a folder when the process is killed.

    Call it where no other process writes: its unfinished files look the same.

    Args:
        folder: not searched deeper; it may be missing.
        ours: whether a file of this name is written there, by the name it would have got.

    Returns:
        The files removed.

    Raises:
        OSError: one cannot be removed.
    """
    found = list(folder.glob(".*.part")) if folder.is_dir() else []
    named = [(path, _PARTIAL.fullmatch(path.name)) for path in found if path.is_file()]
    removed = [path for path, match in named if match is not None and ours(match[1])]
    for path in removed:
        path.unlink(missing_ok=True)
    return removed


def sync_file(path: Path) -> None:
    """Put what was written to a file on disk."""
    _sync(path)


def sync_folder(folder: Path) -> None:
    """Make the renames in a folder survive a power cut."""
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
