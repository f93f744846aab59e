# SPDX-License-Identifier: Apache-2.0
"""The folder of a run belongs to one process at a time, which removes what a dead one left."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from ...io.atomic import remove_partial
from ...io.lock import Lock
from .mesh import Mesh

LOCK = "run.lock"
_UNFINISHED = re.compile(r"\.step-\d+\.part")
_OWN = re.compile(r"(run|settings|wandb)\.json|metrics\.jsonl|sae(-step-\d+)?\.safetensors")


class RunLock:
    """The right of a mesh of processes to write in the folder of a run.

    Its first process makes the folder, locks it, and removes what a process that was killed in the
    middle of a write left of the files of a run. Every process has to make it.

    Args:
        out: folder of the run.
        mesh: processes that train together.

    Raises:
        RuntimeError: another process trains there; nothing was written.
        OSError: the folder cannot be written.
    """

    def __init__(self, out: Path, mesh: Mesh) -> None:
        self._lock: Lock | None = None
        error: Exception | None = None
        if mesh.first:
            try:
                out.mkdir(parents=True, exist_ok=True)
                expected = "Trainer: expected a folder that no other process trains in"
                self._lock = Lock(out / LOCK, expected)
                clear(out)
            except (OSError, RuntimeError) as found:
                error = found
        # The other processes would wait for the first one without an end.
        if mesh.any(error is not None):
            self.release()
            raise error or RuntimeError(
                f"Trainer: expected the first process to open {out}, got an error there"
            )

    def release(self) -> None:
        """Let others train there."""
        if self._lock is not None:
            self._lock.release()


def clear(out: Path) -> list[Path]:
    """Remove unfinished checkpoints and files of a run, and nothing else; hold the lock.

    Returns:
        What was removed.

    Raises:
        OSError: something cannot be removed.
    """
    removed = remove_partial(out, lambda name: _OWN.fullmatch(name) is not None)
    checkpoints = out / "checkpoints"
    if checkpoints.is_dir():
        for path in sorted(checkpoints.iterdir()):
            if path.is_dir() and _UNFINISHED.fullmatch(path.name):
                shutil.rmtree(path)
                removed.append(path)
    return removed
