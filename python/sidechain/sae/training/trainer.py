# SPDX-License-Identifier: Apache-2.0
"""`Trainer`: one run, from its first step or its last checkpoint to the trained dictionary."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from ..._errors import InputError
from ...io.run_folder import read_json, write_json
from ...io.same import difference
from ...store import ActivationStore
from ..architectures.registry import ARCHITECTURES
from ..config import DEFAULT_K, SaeConfig
from ..model import Sae
from . import checkpoint
from .checks import check_selected
from .folder import RunLock
from .interrupt import StopRequest
from .log import Log
from .loggers import LOGGERS
from .machine import say_other_machine
from .mesh import Mesh
from .sources import Item, IterableSource, Source, StoreSource
from .state import TrainState
from .step import train_step
from .train_config import TrainConfig
from .train_metrics import Metrics

RESULT = "sae.safetensors"
SETTINGS = "run.json"
CHECKPOINTS = "checkpoints"
#: Settings that may change while a run goes on.
_FREE = frozenset({"checkpoint_minutes"})


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
        progress: show a bar.
        loggers: of "tensorboard", "wandb"; one that is not installed is named, not an error.

    Raises:
        ValueError: widths that do not fit the source, or a folder with a run of other settings.
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
        progress: bool = True,
        loggers: Sequence[str] = (),
    ) -> None:
        self.config, self.train, self.source = config, train, source
        self.out, self.mesh = Path(out), mesh or Mesh()
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._lock: RunLock | None = None
        self._progress, self._loggers = progress, tuple(loggers)
        unknown = [name for name in loggers if name not in LOGGERS]
        if unknown:
            raise ValueError(f"Trainer: expected loggers of {', '.join(LOGGERS)}, got {unknown[0]}")
        widths = source.widths()
        if widths != (config.d_in, config.width_out):
            raise ValueError(
                f"Trainer: expected rows of widths {config.d_in} and {config.width_out} [d_in, "
                f"d_out], got {widths[0]} and {widths[1]}"
            )
        self._facts = {
            "config": config.to_json(),
            "train": train.to_json(),
            "source": source.identity(),
        }

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
            KeyboardInterrupt, SystemExit: after Ctrl-C or SIGTERM; a checkpoint of the step it was
                in is written first (in a mesh, of the next step that is logged).
        """
        try:
            self.claim()
            if self.result.exists():
                return Sae.load(self.result)
            return self._run()
        finally:
            self._release()

    def _run(self) -> Sae:
        state, offset = self._begin()
        metrics = Metrics(state)
        log = self._log(state, offset)
        with log or contextlib.nullcontext(), StopRequest() as request:
            last = self._loop(state, metrics, log, request)
        return self._finish(state, last)

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    # -- beginning ------------------------------------------------------------------------------

    def claim(self) -> None:
        """Make the folder that of this run, or check that it is; `run` does so first.

        It is locked until `run` has ended, and what a killed process left half written is removed.

        Raises:
            InputError: it holds a run with other settings.
            RuntimeError: another process trains there.
            OSError: it cannot be written.
        """
        path = self.out / SETTINGS
        finished = self.mesh.agree(self.result.exists())
        if self._lock is None and not finished:  # a finished run is only read
            self._lock = RunLock(self.out, self.mesh)
        if self.mesh.first and not path.exists():
            write_json(path, self._facts)
        self.mesh.barrier()
        found = read_json(path)
        for part, wanted in self._facts.items():
            if not isinstance(found.get(part, {}), dict):
                raise InputError(f"{path}: expected an object in {part}, got {found[part]!r}")
            now = {name: value for name, value in wanted.items() if name not in _FREE}
            there = {name: found.get(part, {}).get(name) for name in now}
            other = difference(there, now)
            if other is not None:
                name, theirs, value = other
                raise InputError(
                    f"Trainer: expected {name}={theirs!r} [the run in {self.out}], got "
                    f"{value!r}: go on with its settings, or choose another folder"
                )

    def _begin(self) -> tuple[TrainState, int]:
        found = checkpoint.latest(self.out / CHECKPOINTS, self._facts["config"])
        if found is None:
            own, target = self.source.normalisers(self.train.normalise, centre=self.train.centre)
            if not self.config.transcoder:
                target = None
        else:
            own, target = checkpoint.normalisers(found)
        state = TrainState(self.config, self.train, own, target, mesh=self.mesh, device=self.device)
        if found is None:
            return state, 0
        checkpoint.load(found, state)
        if self.mesh.first:
            say_other_machine(found.manifest.get("machine"), self.device, state.step)
        return state, found.metrics_bytes

    def _log(self, state: TrainState, offset: int) -> Log | None:
        if not self.mesh.first:
            return None
        return Log(
            self.out,
            self.train.steps,
            state.step,
            self.train.batch,
            offset,
            loggers=self._loggers,
            settings=self._facts,
            progress=self._progress,
        )

    # -- the loop -------------------------------------------------------------------------------

    def _loop(
        self, state: TrainState, metrics: Metrics, log: Log | None, request: StopRequest
    ) -> dict[str, float]:
        saved = time.monotonic()
        last: dict[str, float] = {}
        batches = self.source.batches(self.train.batch, state.step, self.mesh, self.device)
        while state.step < self.train.steps:
            rows = next(batches, None)
            if rows is None:
                raise ValueError(
                    f"Trainer: expected {self.train.tokens} rows [tokens], got "
                    f"{state.step * self.train.batch}"
                )
            if state.step == 0:
                state.start_biases(rows)
            metrics.add(train_step(state, rows))
            if log is not None:
                log.step()
            asked = request.asked is not None and self.mesh.world == 1
            if state.step % self.train.log_every and state.step < self.train.steps and not asked:
                continue
            last = self._report(log, metrics.read()) or last
            due = (time.monotonic() - saved) / 60 >= self.train.checkpoint_minutes
            stop = self.mesh.any(request.asked is not None)
            if (stop or self.mesh.agree(due)) and state.step < self.train.steps:
                last = self._report(log, metrics.flush()) or last
                self._save(state, log)
                saved = time.monotonic()
                if stop:
                    self._stop(state, request)
        return self._report(log, metrics.flush()) or last

    def _stop(self, state: TrainState, request: StopRequest) -> None:
        if self.mesh.first:
            print(
                f"sidechain: note: {state.step} of {self.train.steps} steps are saved in "
                f"{self.out / CHECKPOINTS}; the same command goes on from there",
                file=sys.stderr,
            )
        request.stop()

    def _report(self, log: Log | None, found: dict[str, float] | None) -> dict[str, float] | None:
        if log is not None:
            log.write(found)
        return found

    def _save(self, state: TrainState, log: Log | None) -> None:
        check_selected(state)
        if log is not None:
            log.sync()
        facts = {**self._facts, "metrics_bytes": 0 if log is None else log.offset}
        checkpoint.save(self.out / CHECKPOINTS, state, facts)

    def _finish(self, state: TrainState, last: dict[str, float]) -> Sae:
        check_selected(state)
        kept: dict[str, float] = {n: last[n] for n in ("fvu", "l0", "dead") if n in last}
        provenance = replace(
            self.source.provenance(),
            tokens=state.step * self.train.batch,
            metrics=kept,
            extra={"train": self.train.to_json()},
        )
        sae = state.to_sae(provenance)
        if self.mesh.first:
            sae.save(self.result)
        self.mesh.barrier()
        return sae


def train(
    data: Source | ActivationStore | Iterable[Item] | Callable[[], Iterable[Item]] | str | Path,
    out: str | os.PathLike[str],
    *,
    features: int,
    tokens: int,
    mesh: Mesh | None = None,
    device: Any = None,
    progress: bool = True,
    loggers: Sequence[str] = (),
    **settings: Any,
) -> Sae:
    """Train a dictionary, or go on with the run in `out`.

    Args:
        data: a store (open, or the folder of one with a single site), anything `IterableSource`
            takes, or a `Source`; `StoreSource(store, target)` trains a transcoder.
        out: folder of the run; see `Trainer`.
        features: F.
        tokens: rows to train on.
        mesh: see `Mesh`.
        device: see `Trainer`.
        progress: show a bar.
        loggers: see `Trainer`.
        **settings: of `SaeConfig` (architecture, k, prefixes, ...) and of `TrainConfig`.

    Raises:
        TypeError, ValueError, NotImplementedError: settings that do not fit.
    """
    if isinstance(data, str | Path):
        data = ActivationStore(data)
    if isinstance(data, ActivationStore):
        data = StoreSource(data, seed=settings.get("seed", 0))
    source: Any = data if hasattr(data, "normalisers") else IterableSource(data)
    shape = {f.name: settings.pop(f.name) for f in fields(SaeConfig) if f.name in settings}
    return Trainer(
        config_for(source, features, **shape),
        TrainConfig(tokens=tokens, **settings),
        source,
        out,
        mesh=mesh,
        device=device,
        progress=progress,
        loggers=loggers,
    ).run()


def config_for(source: Source, features: int, **shape: Any) -> SaeConfig:
    """Return the dictionary that fits the rows of a source: its widths, and k where it needs one.

    Args:
        source: rows.
        features: F.
        **shape: of `SaeConfig`; k = None is 32, or F if that is less.
    """
    d_in, d_out = source.widths()
    shape.setdefault("transcoder", bool(source.provenance().target_site))
    if shape["transcoder"] or d_out != d_in:
        shape.setdefault("d_out", d_out)
    kind = ARCHITECTURES.get(shape.get("architecture", SaeConfig.architecture))
    if kind is not None and kind.takes("k") and shape.get("k") is None:
        shape["k"] = min(DEFAULT_K, features)
    return SaeConfig(d_in, features, **shape)
