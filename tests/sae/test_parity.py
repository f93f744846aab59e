# SPDX-License-Identifier: Apache-2.0
"""Both paths of a training step against dense autograd and torch's AdamW, step for step."""

from __future__ import annotations

import pytest
import torch

from sae.cases import CASES, batches, has_fused, make
from sae.oracle import DenseTrainer
from sidechain.sae.training.step import train_step
from sidechain.testing.tolerance import assert_close


def run(state, oracles):
    worst = 0.0
    for rows in batches(state.config.transcoder):
        given = [None if t is None else t.clone() for t in rows]
        outcome = train_step(state, rows)
        for before, after in zip(given, rows, strict=True):  # the step may read them in place
            assert before is None or torch.equal(before, after)
        worst = max(worst, float(outcome.row_loss.sum()))
        for oracle in oracles:
            dtype = oracle.b_pre.dtype
            oracle.step(rows.x.to(dtype), None if rows.target is None else rows.target.to(dtype))
    return worst


@pytest.mark.parametrize("case", CASES)
def test_autograd_in_float64(case):
    """The error of the eager form, scaled from float32's precision to that of float64."""
    state = make(case, "autograd", torch.float64)
    state.normaliser.double()
    if state.config.unit_norm:  # drawn with norm 1 in float32 only
        state.weights["w_dec"] /= state.weights["w_dec"].norm(dim=1, keepdim=True)
    exact, eager = DenseTrainer(state), DenseTrainer(state, torch.float32)
    run(state, [exact, eager])
    finer = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    for name, value in exact.weights().items():
        error = finer * (eager.weights()[name].double() - value)
        assert_close(name, state.weights[name], value, value + error)
    assert torch.equal(state.last_fired, exact.last_fired)
    if "aux" in case:
        assert state.dead_total == int(exact.dead.sum()) > 0


@pytest.mark.parametrize(
    ("case", "path"),
    [(case, "autograd") for case in CASES] + [(case, "fused") for case in CASES if has_fused(case)],
)
def test_float32(case, path):
    state = make(case, path)
    exact, eager = DenseTrainer(state), DenseTrainer(state, torch.float32)
    before = {n: t.clone() for n, t in state.weights.items()}
    assert run(state, [exact, eager]) < float("inf")
    assert torch.equal(state.last_fired, exact.last_fired)
    for name, value in exact.weights().items():
        assert_close(name, state.weights[name], value, eager.weights()[name])
        if name != "b_enc":
            assert not torch.equal(state.weights[name], before[name]), name


def test_identity_normaliser_copies_nothing():
    state = make(next(iter(CASES)), "autograd")
    rows = next(iter(batches(state.config.transcoder)))
    x, target = state.normalised(rows)
    assert x.data_ptr() == target.data_ptr() == rows.x.data_ptr()
