# SPDX-License-Identifier: Apache-2.0
"""A lock on a folder: one process, and in it one user, writes there at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import warnings
import weakref
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from .atomic import naming

#: What `flock` says where the file system has no locks (NFS without lockd, some FUSE ones).
_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL})
_HELD: weakref.WeakSet[Lock] = weakref.WeakSet()
_SHARED: weakref.WeakValueDictionary[Path, Lock] = weakref.WeakValueDictionary()


class Lock:
    """A lock that is held from its making to `release`, or to the end of the process.

    The kernel releases it when the process dies, however it dies, so that it is never stale. The
    file stays, empty; what it says counts only while it is locked. A second lock of the same file
    is refused within one process too.

    Args:
        path: file of the lock, made if it is not there.
        expected: beginning of the message, "op: expected ..." without what was found.

    Raises:
        RuntimeError: it is held; the message names the process that holds it.
        OSError: the file cannot be made.
    """

    def __init__(self, path: Path, expected: str) -> None:
        with naming(path):
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _holder(self._descriptor)
            if error.errno not in _NO_LOCKS:
                self.leave()
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    raise OSError(error.errno, os.strerror(error.errno or 0), str(path)) from error
                raise RuntimeError(f"{expected}, got {path.parent} locked by {holder}") from None
            warnings.warn(
                f"{path}: the file system has no locks ({os.strerror(error.errno or 0)}): nothing "
                "keeps a second process from this folder",
                RuntimeWarning,
                stacklevel=3,
            )
        _HELD.add(self)
        self._sign()

    def _sign(self) -> None:
        """Say who holds it; for people, so a full disk is no reason to stop."""
        known = {"pid": os.getpid(), "host": socket.gethostname()}
        known["since"] = datetime.now().astimezone().isoformat(" ", "seconds")
        with contextlib.suppress(OSError):
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, json.dumps(known).encode() + b"\n", 0)

    def release(self) -> None:
        """Release the lock; a second time does nothing."""
        if self._descriptor >= 0:
            with contextlib.suppress(OSError):  # not locked: the file system has no locks
                os.ftruncate(self._descriptor, 0)
                fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            self.leave()

    def leave(self) -> None:
        """Close the file of a lock that another process holds."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def __del__(self) -> None:
        # Not there if the file could not be opened.
        if getattr(self, "_descriptor", -1) >= 0:
            self.release()


def shared(path: Path, expected: str) -> Lock:
    """Return the lock of a file that this process holds already, or a new one.

    For folders whose parts a process opens one after the other. It is held as long as somebody
    keeps it.

    Raises:
        RuntimeError, OSError: see `Lock`.
    """
    known = _SHARED.get(path.absolute())
    if known is None:
        known = _SHARED[path.absolute()] = Lock(path, expected)
    return known


def _holder(descriptor: int) -> str:
    """Return who signed the file; nobody may have, and anybody can write to it."""
    try:
        known: Any = json.loads(os.pread(descriptor, 4096, 0))
        return f"pid {int(known['pid'])} on {known['host']} since {known['since']}"
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return "another process"


def _leave() -> None:
    """Close the locks in a fork: a worker that outlives its parent must not hold them."""
    for lock in list(_HELD):
        lock.leave()
    _SHARED.clear()


os.register_at_fork(after_in_child=_leave)
