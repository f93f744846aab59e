# SPDX-License-Identifier: Apache-2.0
"""The dictionary of a run: at its end, or now, from the last checkpoint."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..._errors import InputError
from ...store.protocol import RowReader
from ..config import Provenance, SaeConfig
from ..features.evaluate import measure
from ..model import Sae
from . import checkpoint
from .collapse import collapsed
from .folder import RunLock
from .log import METRICS
from .mesh import Mesh
from .run_record import RunRecord
from .state import TrainState
from .train_config import TrainConfig

RESULT = "sae.safetensors"
CHECKPOINTS = "checkpoints"
#: Metrics of the last interval that the dictionary keeps.
_KEPT = ("fvu", "l0", "dead")


def finish(out: str | os.PathLike[str]) -> Sae:
    """Make the dictionary of a run that has not ended, from its last checkpoint.

    The weights are those of that step, with the learning rate not yet fallen to zero. The run may
    be taken up again later: `train` with a reason goes on from the same checkpoint.

    Args:
        out: folder of the run.

    Returns:
        The dictionary; also written to `sae.safetensors`. That of a finished run is only read.

    Raises:
        InputError: no run there, or none with a checkpoint.
        RuntimeError: another process trains there.
    """
    folder = Path(out)
    record = RunRecord.read(folder)
    if record.finished is not None and (folder / RESULT).exists():
        return Sae.load(folder / RESULT)
    lock = RunLock(folder, Mesh())
    try:
        return _finish(folder, record)
    finally:
        lock.release()


def _finish(folder: Path, record: RunRecord) -> Sae:
    found = checkpoint.latest(folder / CHECKPOINTS)
    if found is None:
        raise InputError(f"finish: expected a run with a checkpoint, got none in {folder}")
    config = SaeConfig.from_json(record.content["config"])
    train = TrainConfig.from_json(record.content["train"])
    state = TrainState(config, train, *checkpoint.normalisers(found))
    checkpoint.load(found, state)
    origin = Provenance.from_json(record.content.get("provenance", {}))
    skipped = int(found.manifest.get("skipped_rows", 0))
    metrics = logged(folder, state.step)
    sae = dictionary(state, origin, record, metrics=metrics, skipped=skipped)
    sae.save(folder / RESULT)
    record.finish(state.step, early=state.step < train.steps)
    return sae


def dictionary(
    state: TrainState,
    origin: Provenance,
    record: RunRecord,
    *,
    metrics: Mapping[str, float],
    skipped: int,
) -> Sae:
    """Return the dictionary of a state with where it comes from."""
    extra: dict[str, Any] = {"train": state.train.to_json(), "steps": state.step}
    if skipped:
        extra["skipped_rows"] = skipped
    if record.changes:
        extra["changes"] = record.changes
    if record.content.get("start"):
        extra["start"] = record.content["start"]
    if problem := collapsed({**metrics, "step": state.step}, state.schedule) if metrics else "":
        extra["collapsed"] = problem
    provenance = replace(
        origin,
        tokens=state.step * state.train.batch,
        metrics={name: metrics[name] for name in _KEPT if name in metrics},
        extra=extra,
    )
    return state.to_sae(provenance)


def logged(folder: Path, step: int) -> dict[str, float]:
    """Return the newest metrics of a run that are not of a later step; {} = there are none."""
    try:
        lines = (folder / METRICS).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return {}
    for line in reversed(lines):
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict) and isinstance(found.get("step"), int) and found["step"] <= step:
            return {n: v for n, v in found.items() if isinstance(v, int | float)}
    return {}


def with_held_out(sae: Sae, rows: RowReader) -> Provenance:
    """Return where a dictionary comes from, with its metrics on rows it was not trained on."""
    health = measure(sae, rows)
    found = {"fvu": health.fvu, "l0": health.l0, "dead": health.dead}
    metrics = {**sae.provenance.metrics, **{f"held_out_{n}": v for n, v in found.items()}}
    return replace(sae.provenance, metrics=metrics)


def say_early(record: RunRecord, folder: Path, steps: int) -> None:
    """Tell that a finished run ended before its last step."""
    known = record.finished or {}
    if known.get("early"):
        print(
            f"sidechain: note: the run in {folder} was finished at step {known.get('step')} of "
            f"{steps}; give a reason to go on with it",
            file=sys.stderr,
        )
