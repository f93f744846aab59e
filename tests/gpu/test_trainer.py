# SPDX-License-Identifier: Apache-2.0
"""Training on a GPU: the numbers of the CPU, no waiting within a step, and going on bit for bit."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from gpu.support import on
from gpu.waits import LISTS, stand_in, waits_of
from sae.cases import CASES, batches, has_fused, make
from sae.oracle import DenseTrainer
from sidechain.sae import train
from sidechain.sae.training.step import train_step
from sidechain.sae.training.train_metrics import Metrics
from sidechain.testing.tolerance import assert_close

PATHS = [(case, "autograd") for case in CASES] + [(c, "fused") for c in CASES if has_fused(c)]
every_path = pytest.mark.parametrize(("case", "path"), PATHS)
# Steps done before one is looked at: dead features are known by then, and are not looked for.
DONE = 7


@every_path
def test_equals_dense_training_on_the_cpu(device: str, case: str, path: str) -> None:
    state = make(case, path, device=device)
    start = make(case, path)
    exact, eager = DenseTrainer(start), DenseTrainer(start, torch.float32)
    for rows in batches(state.config.transcoder):
        train_step(state, on(device, rows))
        for oracle in (exact, eager):
            dtype = oracle.b_pre.dtype
            oracle.step(rows.x.to(dtype), None if rows.target is None else rows.target.to(dtype))
    for name, value in exact.weights().items():
        assert_close(name, state.weights[name], value, eager.weights()[name])
    assert torch.equal(state.last_fired.cpu(), exact.last_fired)


@every_path
def test_a_step_waits_for_nothing(device: str, case: str, path: str) -> None:
    state = make(case, path, device=device)
    metrics = Metrics(state)
    found = [
        on(device, rows) for rows in itertools.islice(batches(state.config.transcoder), DONE + 1)
    ]
    for rows in found[:DONE]:
        metrics.add(train_step(state, rows))
    assert not state.schedule.updates_dead(state.step)
    assert ("aux" in case) == (state.dead_total > 0)
    state, metrics, rows = stand_in(device, (state, metrics, found[DONE]))
    lists = case.startswith(("batch_topk", "matryoshka")) or "batch_topk" in case
    with waits_of(device, 2 * lists) as waits:
        metrics.add(train_step(state, rows))
    if device == "cpu":
        assert waits == [LISTS] * lists
    else:
        assert len(waits) in ((1, 2) if lists else (0,))


def test_metrics_wait_for_their_own_copy_alone(device: str) -> None:
    """What was queued after a reading may still run when the reading is there."""
    state = make("topk", "fused", device=device)
    metrics = Metrics(state)
    for rows in itertools.islice(batches(False), 2):
        metrics.add(train_step(state, on(device, rows)))
    assert metrics.read() is None
    after = None
    if device == "cuda":
        torch.cuda._sleep(10**9)  # half a second
        after = torch.cuda.current_stream().record_event()
    found = metrics.flush()
    assert after is None or not after.query()
    assert found is not None and found["step"] == 2 and 0 < found["fvu"] < 2


SETTINGS: dict[str, dict[str, Any]] = {
    "topk aux": dict(architecture="topk", k=4, aux_k=8, dead_every=7),
    "batch_topk": dict(architecture="batch_topk", k=4),
    "matryoshka aux": dict(architecture="matryoshka", k=4, aux_k=8, dead_every=7),
    "bf16 moments": dict(architecture="topk", k=4, bf16_moments=True),
    "resampled": dict(architecture="topk", k=4, k_start=16, resample=0.2),
    "jumprelu": dict(architecture="jumprelu"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_goes_on_bit_for_bit(
    device: str, case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sae.test_trainer import SHORT, Cut, N, make_store, same_run

    folder = make_store(tmp_path / "store")
    settings = {**SHORT, "dead_tokens": 3 * N, "checkpoint_minutes": 0.0, **SETTINGS[case]}
    settings |= {"device": device, "tokens": N * 30}
    if case == "jumprelu":
        settings.pop("dead_tokens")
    train(folder, tmp_path / "whole", **settings)
    left = [0]

    def cut(state: Any, rows: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise Cut
        return train_step(state, rows)

    monkeypatch.setattr("sidechain.sae.training.trainer.train_step", cut)
    for steps in (3, 9, 12, 1000):
        left[0] = steps
        try:
            train(folder, tmp_path / "parts", **settings)
        except Cut:
            continue
    (last,) = (tmp_path / "parts" / "checkpoints").iterdir()  # the end: a reason may add steps
    assert last.name == "step-000000030"
    same_run(tmp_path / "whole", tmp_path / "parts")
