# SPDX-License-Identifier: Apache-2.0
"""`Trainer`: one run, from its first step or its last checkpoint to the trained dictionary."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..._errors import InputError
from ..config import Provenance, SaeConfig
from ..model import Sae
from ..normaliser import Normaliser
from ..starting import normalisers, opened, shaped, weights
from . import checkpoint
from .bad_rows import checked
from .checks import check_selected
from .collapse import CollapseWatch
from .finishing import CHECKPOINTS, RESULT, dictionary, logged, say_early, with_held_out
from .folder import RunLock
from .interrupt import StopRequest
from .log import Log
from .machine import say_other_machine
from .mesh import Mesh
from .opening import check_source, check_stream
from .options import RunOptions
from .rows import Rows
from .run_record import RunRecord
from .sources import Source
from .state import TrainState
from .step import train_step
from .train_config import TrainConfig
from .train_metrics import Metrics


class Trainer:
    """Trains one dictionary in one folder.

    The folder holds `run.json` (settings), `metrics.jsonl`, `checkpoints/` and, at the end,
    `sae.safetensors`. The same call again goes on from the last checkpoint and ends with the same
    weights, bit for bit, as if it had never stopped, also after `kill -9`; equal up to rounding on
    another number of processes or threads, and where another instruction set, torch or device
    computes, which a note says. One process trains in a folder at a time.

    Args:
        config: what to train.
        train: how.
        source: rows.
        out: folder of the run, made if it is not there.
        mesh: processes to share the work; None = this one alone.
        device: of the weights; None = CUDA where there is one.
        **options: of `RunOptions`.

    Raises:
        InputError, ValueError: widths or a target that do not fit the source, more tokens than it
            has, or a folder with a run of other settings or other rows.
        RuntimeError: another process trains in the folder.
    """

    def __init__(
        self,
        config: SaeConfig,
        train: TrainConfig,
        source: Source,
        out: str | os.PathLike[str],
        *,
        mesh: Mesh | None = None,
        device: Any = None,
        **options: Any,
    ) -> None:
        self.config, self.train, self.source = config, train, source
        self.out, self.mesh = Path(out), mesh or Mesh()
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._options = RunOptions(**options)
        check_source(config, train, source)
        start = None if self._options.start is None else opened(self._options.start)
        self._start = None if start is None else start.sae
        if self._start is not None and shaped(self._start, config.to_json()) != config:
            raise InputError(
                f"Trainer: expected the config of the dictionary it starts from, "
                f"{shaped(self._start, {})}, got {config}"
            )
        self._facts = {
            "config": config.to_json(),
            "train": train.to_json(),
            "source": source.identity(),
            "start": {} if start is None else start.facts,
        }
        self.record = RunRecord(self.out, {**self._facts, "provenance": self._origin().to_json()})
        self._skipped = 0
        self._lock: RunLock | None = None

    @property
    def result(self) -> Path:
        """File of the trained dictionary."""
        return self.out / RESULT

    def run(self) -> Sae:
        """Train to the end and return the dictionary, in eval mode on the CPU.

        Returns:
            The dictionary; also written to `sae.safetensors`. A run that is finished already is
            only read.

        Raises:
            InputError: a bad row, no more rows before the end, or weights that are not finite; the
                steps before it are saved.
            KeyboardInterrupt, SystemExit: after Ctrl-C or SIGTERM; a checkpoint of the step it was
                in is written first (in a mesh, of the next step that is logged).
        """
        try:
            self.claim()
            if self.record.finished is not None and self.result.exists():
                say_early(self.record, self.out, self.train.steps)
                return Sae.load(self.result)
            return self._run()
        finally:
            if self._lock is not None:
                self._lock.release()
                self._lock = None

    def _run(self) -> Sae:
        state, offset = self._begin()
        self._watch = CollapseWatch(state.schedule)
        metrics = Metrics(state)
        with self._log(state, offset) or contextlib.nullcontext() as log:
            with StopRequest() as request:
                last = self._loop(state, metrics, log, request)
            return self._finish(state, log, last)

    # -- beginning ------------------------------------------------------------------------------

    def claim(self) -> None:
        """Make the folder that of this run, or check that it is; `run` does so first.

        It is locked until `run` has ended, and what a killed process left half written is removed.
        A run that is finished and stays as it is is only read.

        Raises:
            InputError: it holds a run with other settings or of other rows.
            RuntimeError: another process trains there.
            OSError: it cannot be written.
        """
        reason = self._options.reason
        only_read = self.result.exists() and self.record.is_finished() and not reason
        if self._lock is None and not self.mesh.agree(only_read):
            self._lock = RunLock(self.out, self.mesh)
        if self.mesh.first:
            self.record.create()
        self.mesh.barrier()
        found = checkpoint.latest(self.out / CHECKPOINTS) if reason else None
        step = 0 if found is None else found.step
        changed = self.record.compare(reason, step * self.train.batch)
        self.mesh.barrier()
        if changed and found is None and self.record.finished is not None:
            raise InputError(
                f"Trainer: expected a checkpoint to go on from in {self.out / CHECKPOINTS} [the "
                "run is finished], got none: start another one from its dictionary"
            )
        early = (self.record.finished or {}).get("early") and reason
        if (changed or early) and self.mesh.first:
            if self.result.exists():  # of the settings before
                os.replace(self.result, self.out / f"sae-step-{step:09d}.safetensors")
            self.record.change(changed, reason, step)
        self.mesh.barrier()

    def _begin(self) -> tuple[TrainState, int]:
        found = checkpoint.latest(self.out / CHECKPOINTS, self._facts["config"])
        if found is None:
            own, target = self._normalisers()
        else:
            own, target = checkpoint.normalisers(found)
        first = None
        if self._start is not None and found is None:
            first = weights(self._start, self.config, own, target, seed=self.train.seed)
        state = TrainState(
            self.config,
            self.train,
            own,
            target,
            mesh=self.mesh,
            device=self.device,
            first=first,
        )
        if found is None:
            return state, 0
        checkpoint.load(found, state)
        self._skipped = int(found.manifest.get("skipped_rows", 0))
        check_stream(self.source, found)
        if self.mesh.first:
            say_other_machine(found.manifest.get("machine"), self.device, state.step)
        return state, found.metrics_bytes

    def _normalisers(self) -> tuple[Normaliser, Normaliser | None]:
        looked_at = getattr(self.source, "bad_rows", None)
        if looked_at is not None:
            looked_at.policy = self.train.on_bad_rows
        try:
            return self._fitted()
        except InputError as error:
            raise InputError(f"Trainer: before step 1: {error}") from None

    def _fitted(self) -> tuple[Normaliser, Normaliser | None]:
        def of(kind: str) -> tuple[Normaliser, Normaliser | None]:
            return self.source.normalisers(kind, centre=self.train.centre)

        kind = self.train.normalise
        return of(kind) if self._start is None else normalisers(self._start, of, kind)

    def _log(self, state: TrainState, offset: int) -> Log | None:
        if not self.mesh.first:
            return None
        return Log(
            self.out,
            self.train.steps,
            state.step,
            self.train.batch,
            offset,
            loggers=self._options.loggers,
            settings=self._facts,
            progress=self._options.progress,
        )

    # -- the loop -------------------------------------------------------------------------------

    def _loop(
        self, state: TrainState, metrics: Metrics, log: Log | None, request: StopRequest
    ) -> dict[str, float]:
        saved = time.monotonic()
        last: dict[str, float] = {}
        batches = self._batches(state)
        while state.step < self.train.steps:
            rows = self._next(batches, state, metrics, log)
            if state.step == 0:
                state.start_biases(rows)
            metrics.add(train_step(state, rows))
            if log is not None:
                log.step()
            asked = request.asked is not None and self.mesh.world == 1
            if state.step % self.train.log_every and state.step < self.train.steps and not asked:
                continue
            last = self._report(state, log, metrics.read()) or last
            due = (time.monotonic() - saved) / 60 >= self.train.checkpoint_minutes
            stop = self.mesh.any(request.asked is not None)
            if (stop or self.mesh.agree(due)) and state.step < self.train.steps:
                last = self._report(state, log, metrics.flush()) or last
                self._save(state, log)
                saved = time.monotonic()
                if stop:
                    self._stop(state, request)
        return self._report(state, log, metrics.flush()) or last

    def _batches(self, state: TrainState) -> Iterator[Rows]:
        """Return the batches from the step of a state on."""
        looked_at = getattr(self.source, "bad_rows", None)
        if looked_at is not None:
            looked_at.policy, looked_at.skipped = self.train.on_bad_rows, self._skipped
        batches = self.source.batches(self.train.batch, state.step, self.mesh, self.device)
        return batches if looked_at is not None else checked(batches)

    def _next(
        self, batches: Iterator[Rows], state: TrainState, metrics: Metrics, log: Log | None
    ) -> Rows:
        """Return the next batch; where there is none, save what was trained and say why.

        Raises:
            InputError: a bad row, or the rows have ended.
        """
        problem = ""
        rows = None
        try:
            rows = next(batches, None)
        except InputError as error:
            problem = str(error)
        if rows is None and not problem:
            problem = (
                f"expected {self.train.tokens} rows [tokens], got "
                f"{state.step * self.train.batch} and no more"
            )
        if not self.mesh.any(bool(problem)):
            assert rows is not None
            return rows
        if state.step:
            self._report(state, log, metrics.read())
            self._report(state, log, metrics.flush())
            self._save(state, log)
        kept = f"; the {state.step} steps before are saved in {self.out}" if state.step else ""
        hint = f", sidechain.sae.finish({str(self.out)!r}) makes a dictionary of them"
        raise InputError(
            f"Trainer: step {state.step + 1}: {problem or 'another process has no good rows'}{kept}"
            + (hint if state.step else "")
        )

    def _stop(self, state: TrainState, request: StopRequest) -> None:
        if self.mesh.first:
            print(
                f"sidechain: note: {state.step} of {self.train.steps} steps are saved in "
                f"{self.out / CHECKPOINTS}; the same command goes on from there",
                file=sys.stderr,
            )
        request.stop()

    def _report(
        self, state: TrainState, log: Log | None, found: dict[str, float] | None
    ) -> dict[str, float] | None:
        if found is not None and not math.isfinite(found["fvu"]):
            self._check_weights(state)
        if log is not None:
            log.write(found)
            self._watch.look(found)
        return found

    def _check_weights(self, state: TrainState) -> None:
        """Refuse to keep weights that are not finite.

        Raises:
            InputError: they are not; it names the tensor and the step.
        """
        name = state.not_finite()
        if not self.mesh.any(bool(name)):
            return
        raise InputError(
            f"Trainer: step {state.step}: expected finite weights, got others in "
            f"{name or 'another process'} [training diverged: lower lr, now "
            f"{state.schedule.lr(max(0, state.step - 1)):g}, or set clip]; the checkpoints before "
            f"it stay in {self.out / CHECKPOINTS}"
        )

    def _save(self, state: TrainState, log: Log | None) -> None:
        self._check_weights(state)
        check_selected(state)
        if log is not None:
            log.sync()
        facts = {
            **self._facts,
            "metrics_bytes": 0 if log is None else log.offset,
            "skipped_rows": self._count_skipped(),
            "stream": getattr(self.source, "checksum", None),
        }
        checkpoint.save(self.out / CHECKPOINTS, state, facts)

    def _count_skipped(self) -> int:
        """Return how many bad rows were left out since the start of the run."""
        known = getattr(self.source, "bad_rows", None)
        return 0 if known is None else int(known.skipped)

    # -- the end --------------------------------------------------------------------------------

    def _finish(self, state: TrainState, log: Log | None, last: dict[str, float]) -> Sae:
        self._check_weights(state)
        check_selected(state)
        metrics = last or logged(self.out, state.step)  # no step was left to do
        sae = dictionary(
            state, self._origin(), self.record, metrics=metrics, skipped=self._count_skipped()
        )
        if self._options.held_out_rows is not None:
            sae.provenance = with_held_out(sae, self._options.held_out_rows)
        if self.mesh.first:
            sae.save(self.result)
        self._save(state, log)
        if self.mesh.first:
            checkpoint.prune(self.out / CHECKPOINTS, keep=1)
            self.record.finish(state.step, early=False)
        self.mesh.barrier()
        return sae

    def _origin(self) -> Provenance:
        return self.source.provenance()
