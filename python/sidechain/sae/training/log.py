# SPDX-License-Identifier: Apache-2.0
"""Progress of a run: a bar, one JSON line an interval, and other loggers on request."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tqdm.auto import tqdm

from .loggers import Loggers
from .metrics_file import MetricsFile

METRICS = "metrics.jsonl"


class Log:
    """Progress of a run, written by its first process.

    Args:
        folder: of the run; `metrics.jsonl` is appended to, see `MetricsFile`.
        total: steps of the run.
        done: steps done before.
        rows: rows of a step.
        offset: length of `metrics.jsonl` at the checkpoint the run goes on from.
        loggers: of `LOGGERS`.
        settings: of the run, for the loggers.
        progress: show the bar.

    Attributes:
        absent: logger -> why it is not there.

    Raises:
        OSError: the metrics file cannot be written; it is named. Loggers raise nothing.
    """

    def __init__(
        self,
        folder: Path,
        total: int,
        done: int,
        rows: int,
        offset: int,
        *,
        loggers: Sequence[str] = (),
        settings: dict[str, Any] | None = None,
        progress: bool = True,
    ) -> None:
        self._rows = rows
        self._file = MetricsFile(folder / METRICS, done, offset)
        self._bar = tqdm(
            total=total, initial=done, desc="sae", unit="step", disable=not progress, smoothing=0.1
        )
        # Metrics come an interval late, so the speed is read from when the steps were counted.
        self._step = self._last = done
        self._times = {done: time.perf_counter()}
        self._loggers = Loggers(loggers, folder, settings or {}, done)
        self.absent = self._loggers.absent

    @property
    def offset(self) -> int:
        """Length of the metrics file."""
        return self._file.length

    def step(self) -> None:
        """Count a step."""
        self._step += 1
        self._times[self._step] = time.perf_counter()
        self._show(self._bar.update)

    def write(self, metrics: dict[str, float] | None) -> None:
        """Write the metrics of an interval, once they are there."""
        if metrics is None:
            return
        step = int(metrics["step"])
        passed = self._times[step] - self._times[self._last]
        speed = (step - self._last) * self._rows / max(1e-9, passed)
        self._last = step
        self._times = {at: moment for at, moment in self._times.items() if at >= step}
        line = {**metrics, "tokens_per_s": round(speed, 1)}
        self._file.write(line)
        text = (
            f"fvu {metrics['fvu']:.3f}, L0 {metrics['l0']:.1f}, dead {metrics['dead']:.1%}, "
            f"{speed:,.0f} tokens/s"
        )
        self._show(lambda: self._bar.set_postfix_str(text))
        self._loggers.write(step, line)

    def _show(self, draw: Callable[[], Any]) -> None:
        """Draw the bar; where it cannot be written (a full disk, a closed pipe) there is none."""
        try:
            draw()
        except OSError:
            self._bar.disable = True

    def sync(self) -> None:
        """Put what was written on disk."""
        self._file.sync()

    def close(self, *, failed: bool = False) -> None:
        """End the bar, the loggers and the file.

        Args:
            failed: the training did not come to its end.
        """
        self._show(self._bar.close)
        self._loggers.close(failed=failed)
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(failed=kind is not None)
