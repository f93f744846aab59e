# SPDX-License-Identifier: Apache-2.0
"""Options of `train` that are no settings of the dictionary: how rows are read, what is shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .loggers import LOGGERS


@dataclass(frozen=True)
class DataOptions:
    """How own activations are read.

    Attributes:
        target: the same rows at another place, anything that `data` may be: a transcoder.
        steps: scheduler step of each row [N], where the data does not say.
        column: of a table or of a file with several tensors.
        shuffle: "rows" | "blocks" | "off", see `BatchOptions`; of what is read by number.
        buffer: rows of a stream that are shuffled together; 0 = in the order they come.
        epochs: times through the rows. None = once; a store without end.
        held_out: share of the rows that is not trained on but measured at the end.
        seed: of the order.
    """

    target: Any = None
    steps: Any = None
    column: str | None = None
    shuffle: str = "rows"
    buffer: int = 0
    epochs: int | None = None
    held_out: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs is not None and (
            isinstance(self.epochs, bool) or not isinstance(self.epochs, int) or self.epochs < 1
        ):
            raise ValueError(f"train: expected epochs >= 1 or None, got {self.epochs!r}")
        if isinstance(self.buffer, bool) or not isinstance(self.buffer, int) or self.buffer < 0:
            raise ValueError(f"train: expected buffer >= 0 [rows], got {self.buffer!r}")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"train: expected held_out in [0, 1), got {self.held_out!r}")


@dataclass(frozen=True)
class RunOptions:
    """What is no setting of the result of a run.

    Attributes:
        progress: show a bar.
        loggers: of `LOGGERS`; one that is not installed is named, not an error.
        reason: why settings differ from those that the run in the folder was started with (tokens,
            lr, k, ...; others never may); kept in `run.json` and in the dictionary.
        start: a dictionary to start from: `Sae`, a file or folder of any format of
            `sidechain.sae.formats`, the folder of a finished run, or a hub id. Its weights are the
            first ones, the optimiser starts anew; it is named in `run.json` and in the result.
        held_out_rows: to measure the dictionary on at the end, read by number (`RowReader`).
    """

    progress: bool = True
    loggers: Sequence[str] = ()
    reason: str = ""
    start: Any = None
    held_out_rows: Any = None

    def __post_init__(self) -> None:
        unknown = [name for name in self.loggers if name not in LOGGERS]
        if unknown:
            raise ValueError(f"Trainer: expected loggers of {', '.join(LOGGERS)}, got {unknown[0]}")
