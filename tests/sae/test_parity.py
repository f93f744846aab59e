# SPDX-License-Identifier: Apache-2.0
"""Both paths of a training step against dense autograd and torch's AdamW, step for step."""

from __future__ import annotations

import pytest
import torch

from sae.oracle import DenseTrainer, planted
from sidechain.sae import Normaliser, SaeConfig, TrainConfig
from sidechain.sae.state import Rows, TrainState
from sidechain.sae.step import train_step
from sidechain.testing.tolerance import assert_close

D, D_OUT, F, N, STEPS = 24, 20, 64, 96, 16
CASES = {
    "topk": dict(architecture="topk", k=4),
    "topk, clipped": dict(architecture="topk", k=4, clip=0.02),
    "topk, k annealed": dict(architecture="topk", k=3, k_start=12, k_anneal=0.5),
    "topk, aux": dict(architecture="topk", k=3, aux_k=6, dead_tokens=4 * N, dead_every=3),
    "topk, aux with few dead": dict(
        architecture="topk", k=3, aux_k=60, dead_tokens=4 * N, dead_every=3
    ),
    "topk, weight decay": dict(architecture="topk", k=4, weight_decay=0.1),
    "topk, free norm": dict(architecture="topk", k=4, unit_norm=False),
    "topk, untied": dict(architecture="topk", k=4, tied_bias=False),
    "multi_topk": dict(architecture="topk", k=3, multi_k=12),
    "multi_topk, aux, clipped": dict(
        architecture="topk", k=3, multi_k=12, aux_k=6, dead_tokens=4 * N, dead_every=3, clip=0.05
    ),
    "transcoder": dict(architecture="topk", k=4, d_out=D_OUT),
    "transcoder, batch_topk": dict(architecture="batch_topk", k=4, d_out=D_OUT),
    "batch_topk": dict(architecture="batch_topk", k=4),
    "batch_topk, aux": dict(
        architecture="batch_topk", k=3, aux_k=6, dead_tokens=4 * N, dead_every=3
    ),
    "matryoshka": dict(architecture="matryoshka", k=4, prefixes=(8, 24, F)),
    "matryoshka, aux": dict(
        architecture="matryoshka", k=3, aux_k=6, dead_tokens=4 * N, dead_every=3
    ),
    "relu": dict(architecture="relu", sparsity=0.3),
    "relu, free norm": dict(architecture="relu", sparsity=0.3, unit_norm=False),
    "gated": dict(architecture="gated", sparsity=0.3),
    "gated, free norm, clipped": dict(
        architecture="gated", sparsity=0.3, unit_norm=False, clip=0.02
    ),
    "jumprelu, tanh": dict(
        architecture="jumprelu", sparsity=0.3, bandwidth=0.5, threshold_init=0.1, pre_act=0.01
    ),
    "jumprelu, l0": dict(
        architecture="jumprelu", penalty="l0", sparsity=0.1, bandwidth=0.2, threshold_init=0.05
    ),
}
SHAPE = ("architecture", "k", "d_out", "prefixes", "unit_norm", "tied_bias")


def make(case, path, dtype=torch.float32):
    settings = {"aux_k": 0, **CASES[case]}
    config = SaeConfig(D, F, **{n: settings.pop(n) for n in SHAPE if n in settings})
    if config.architecture not in ("topk", "batch_topk", "matryoshka"):
        settings.pop("aux_k")
    train = TrainConfig(
        tokens=N * STEPS, batch=N, lr=3e-3, warmup=0.25, decay_share=0.5, path=path, **settings
    )
    target = None
    if config.transcoder:
        target = Normaliser.identity(D_OUT)
    state = TrainState(config, train, Normaliser.identity(D), target, dtype=dtype)
    if "aux" in case:
        state.weights["w_enc"][::5] *= 0.01  # positive, but never among the largest
    return state


def batches(transcoder):
    x, _ = planted(N * STEPS, D, seed=3)
    y = x @ torch.randn(D, D_OUT) if transcoder else None
    for start in range(0, len(x), N):
        yield Rows(x[start : start + N], None, None if y is None else y[start : start + N])


def run(state, oracles):
    worst = 0.0
    for rows in batches(state.config.transcoder):
        outcome = train_step(state, rows)
        worst = max(worst, float(outcome.row_loss.sum()))
        for oracle in oracles:
            dtype = oracle.b_pre.dtype
            oracle.step(rows.x.to(dtype), None if rows.target is None else rows.target.to(dtype))
    return worst


def fused(case):
    return CASES[case]["architecture"] in ("topk", "batch_topk")


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
    [(case, "autograd") for case in CASES] + [(case, "fused") for case in CASES if fused(case)],
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
