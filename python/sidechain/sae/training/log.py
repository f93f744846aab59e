# SPDX-License-Identifier: Apache-2.0
"""Progress of a run: a bar, one JSON line an interval, and other loggers on request."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ...io.atomic import naming

METRICS = "metrics.jsonl"


class Log:
    """Progress of a run, written by its first process.

    Args:
        folder: of the run; `metrics.jsonl` is appended to.
        total: steps of the run.
        done: steps done before.
        rows: rows of a step.
        offset: length of `metrics.jsonl` at the checkpoint the run goes on from; what a crashed
            run wrote after it is cut off, so that every step has one line.
        loggers: of `LOGGERS`.
        settings: of the run, for the loggers.
        progress: show the bar.

    Attributes:
        absent: logger -> why it is not there.
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
        self._path = folder / METRICS
        self._file = open(self._path, "ab")  # noqa: SIM115
        self._file.truncate(offset)
        self._bar = tqdm(
            total=total, initial=done, desc="sae", unit="step", disable=not progress, smoothing=0.1
        )
        # Metrics come an interval late, so the speed is read from when the steps were counted.
        self._step = self._last = done
        self._times = {done: time.perf_counter()}
        self.absent: dict[str, str] = {}
        self._writers = []
        for name in loggers:
            try:
                self._writers.append(_WRITERS[name](folder, settings or {}))
            except ImportError as error:
                self.absent[name] = str(error)
                print(f"sidechain: note: no {name}: {error}", file=sys.stderr)

    @property
    def offset(self) -> int:
        """Length of the metrics file."""
        return self._file.tell()

    def step(self) -> None:
        """Count a step."""
        self._step += 1
        self._times[self._step] = time.perf_counter()
        self._bar.update()

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
        with naming(self._path):
            self._file.write(json.dumps(line).encode() + b"\n")
            self._file.flush()
        self._bar.set_postfix_str(
            f"fvu {metrics['fvu']:.3f}, L0 {metrics['l0']:.1f}, dead {metrics['dead']:.1%}, "
            f"{speed:,.0f} tokens/s"
        )
        for writer in self._writers:
            writer(step, line)

    def sync(self) -> None:
        """Put what was written on disk."""
        with naming(self._path):
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """End the bar and the file."""
        self._bar.close()
        self._file.close()


class _TensorBoard:
    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def __call__(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)


class _WandB:
    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        import wandb

        self._run = wandb.init(dir=str(folder), config=settings, resume="allow", id=folder.name)

    def __call__(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log(metrics, step=step)


_WRITERS: dict[str, Any] = {"tensorboard": _TensorBoard, "wandb": _WandB}
