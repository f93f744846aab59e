# SPDX-License-Identifier: Apache-2.0
"""Loggers beside the metrics file: each run has its own, and none of them ends a training."""

from __future__ import annotations

import contextlib
import json
import re
import sys
import uuid
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from ...io.run_folder import read_json, write_json

LOGGERS = ("tensorboard", "wandb")
WANDB = "wandb.json"


class Logger(Protocol):
    """One logger of one run."""

    def __call__(self, step: int, metrics: dict[str, Any]) -> None:
        """Write the metrics of a step."""

    def close(self, *, failed: bool) -> None:
        """Write what is left and end the run of the logger."""


class Loggers:
    """The loggers of a run; an error of one is said in a warning, and that one left out.

    Args:
        names: of `LOGGERS`.
        folder: of the run.
        settings: of the run.
        done: steps done before.

    Attributes:
        absent: logger -> why it is not there.
    """

    def __init__(
        self, names: Sequence[str], folder: Path, settings: dict[str, Any], done: int
    ) -> None:
        self.absent: dict[str, str] = {}
        self._open: dict[str, Logger] = {}
        for name in dict.fromkeys(names):
            try:
                self._open[name] = _KINDS[name](folder, settings, done)
            except ImportError as error:
                self.absent[name] = str(error)
                print(f"sidechain: note: no {name}: {error}", file=sys.stderr)
            except Exception as error:
                self._leave_out(name, "open", error)

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """Write the metrics of a step."""
        for name, logger in list(self._open.items()):
            try:
                logger(step, metrics)
            except Exception as error:
                del self._open[name]
                self._leave_out(name, "write to", error)
                with contextlib.suppress(Exception):
                    logger.close(failed=True)

    def close(self, *, failed: bool) -> None:
        """End all of them.

        Args:
            failed: the training did not come to its end.
        """
        while self._open:
            name, logger = self._open.popitem()
            try:
                logger.close(failed=failed)
            except Exception as error:
                self._leave_out(name, "close", error)

    def _leave_out(self, name: str, action: str, error: Exception) -> None:
        text = " ".join(str(error).split()) or type(error).__name__
        self.absent[name] = text
        warnings.warn(
            f"{name}: expected to {action} it, got {type(error).__name__}: {text}; training goes "
            "on without it",
            RuntimeWarning,
            stacklevel=4,
        )


class TensorBoard:
    """Event files in `FOLDER/tensorboard`."""

    def __init__(self, folder: Path, settings: dict[str, Any], done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        place = folder / "tensorboard"
        # Readers drop what a crashed run wrote of the steps that come again.
        again = any(place.glob("events.*"))
        self._writer = SummaryWriter(str(place), purge_step=done + 1 if again else None)

    def __call__(self, step: int, metrics: dict[str, Any]) -> None:
        """Write the metrics of a step."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self, *, failed: bool) -> None:
        """Write what is left and close the file."""
        try:
            self._writer.flush()
        finally:
            self._writer.close()


class WandB:
    """A run of Weights & Biases; that of the same folder goes on."""

    def __init__(self, folder: Path, settings: dict[str, Any], done: int) -> None:
        import wandb

        # A run of its own beside others of this process, which the caller may have open.
        self._run = wandb.init(
            dir=str(folder.resolve()),
            config=json.loads(json.dumps(settings, default=str)),
            id=_wandb_id(folder),
            name=run_name(folder),
            resume="allow",
            reinit="create_new",
        )

    def __call__(self, step: int, metrics: dict[str, Any]) -> None:
        """Write the metrics of a step; what the run has of it already stays."""
        self._run.log(metrics, step=step)

    def close(self, *, failed: bool) -> None:
        """Wait for what is left to be sent and end the run."""
        self._run.finish(exit_code=int(failed))


def run_name(folder: Path) -> str:
    """Return a name for people: the last two parts of the path, at most 128 characters."""
    text = "/".join(part for part in folder.resolve().parts[-2:] if part != "/")
    return re.sub(r"[^\w. /+=-]+", "-", text)[-128:] or "run"


def _wandb_id(folder: Path) -> str:
    """Return the id of the folder's run, drawn once: folders of one name have ids of their own."""
    path = folder / WANDB
    if path.is_file():
        with contextlib.suppress(ValueError):
            known = read_json(path).get("id")
            if isinstance(known, str) and re.fullmatch(r"[A-Za-z0-9_-]{1,64}", known):
                return known
    made = uuid.uuid4().hex[:16]
    write_json(path, {"id": made})
    return made


_KINDS: dict[str, Callable[[Path, dict[str, Any], int], Logger]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
}
