# SPDX-License-Identifier: Apache-2.0
"""Training settings that are compared with dense training, in one process and in several."""

from __future__ import annotations

import torch

from sae.oracle import planted
from sidechain.sae import Normaliser, Rows, SaeConfig, TrainConfig
from sidechain.sae.architectures.registry import ARCHITECTURES
from sidechain.sae.training.state import TrainState

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
    "matryoshka, untied, free norm, clipped": dict(
        architecture="matryoshka",
        k=4,
        prefixes=(1, 5, 60, F),
        unit_norm=False,
        tied_bias=False,
        clip=0.02,
    ),
    "matryoshka, transcoder, one prefix": dict(
        architecture="matryoshka", k=4, d_out=D_OUT, prefixes=(F,)
    ),
    "relu": dict(architecture="relu", sparsity=0.3),
    "relu, free norm": dict(architecture="relu", sparsity=0.3, unit_norm=False),
    "gated": dict(architecture="gated", sparsity=0.3),
    "gated, free norm, clipped": dict(
        architecture="gated", sparsity=0.3, unit_norm=False, clip=0.02
    ),
    "relu, controlled": dict(architecture="relu", l0=6),
    "gated, controlled": dict(architecture="gated", l0=6),
    "jumprelu, tanh": dict(
        architecture="jumprelu",
        sparsity=0.3,
        bandwidth=0.5,
        threshold_init=0.1,
        threshold_lr=3e-3,
        pre_act=0.01,
    ),
    "jumprelu, l0": dict(
        architecture="jumprelu",
        penalty="l0",
        sparsity=0.1,
        bandwidth=0.2,
        threshold_init=0.05,
        threshold_lr=2e-2,
    ),
    "jumprelu, l0, controlled": dict(
        architecture="jumprelu",
        penalty="l0",
        l0=9,
        bandwidth=0.2,
        threshold_init=0.3,
        threshold_lr=2e-2,
    ),
}
SHAPE = ("architecture", "k", "d_out", "prefixes", "unit_norm", "tied_bias")


def make(case, path, dtype=torch.float32, mesh=None, device="cpu"):
    settings = {"aux_k": 0, **CASES[case]}
    config = SaeConfig(D, F, **{n: settings.pop(n) for n in SHAPE if n in settings})
    if not config.kind.selects:
        settings.pop("aux_k")
    train = TrainConfig(
        tokens=N * STEPS, batch=N, lr=3e-3, warmup=0.25, decay_share=0.5, path=path, **settings
    )
    target = None
    if config.transcoder:
        target = Normaliser.identity(D_OUT)
    normaliser = Normaliser.identity(D)
    state = TrainState(config, train, normaliser, target, mesh=mesh, device=device, dtype=dtype)
    if "aux" in case:
        numbers = torch.arange(state.first, state.first + state.size, device=device)
        weak = numbers % 5 == 0
        state.weights["w_enc"][weak] *= 0.01  # positive, but never among the largest
    return state


def batches(transcoder):
    x, _ = planted(N * STEPS, D, seed=3)
    mixing = torch.randn(D, D_OUT, generator=torch.Generator().manual_seed(1))
    y = x @ mixing if transcoder else None
    for start in range(0, len(x), N):
        yield Rows(x[start : start + N], None, None if y is None else y[start : start + N])


def has_fused(case):
    return ARCHITECTURES[CASES[case]["architecture"]].fused
