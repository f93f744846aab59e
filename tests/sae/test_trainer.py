# SPDX-License-Identifier: Apache-2.0
"""Runs: what they learn, what they write, where they go on."""

from __future__ import annotations

import itertools

import pytest
import torch

from sae.oracle import planted
from sidechain.sae import (
    Sae,
    train,
)

D, F, N = 24, 64, 512


def similarity(sae, directions):
    """Mean over the planted directions of the best cosine with a decoder row."""
    rows = sae.w_dec.detach()
    return float((directions @ (rows / rows.norm(dim=1, keepdim=True)).T).max(1).values.mean())


RECOVERY = {
    "topk": dict(architecture="topk", k=3),
    "topk, autograd": dict(architecture="topk", k=3, path="autograd"),
    "multi_topk": dict(architecture="topk", k=3, multi_k=12),
    "batch_topk": dict(architecture="batch_topk", k=3),
    "matryoshka": dict(architecture="matryoshka", k=3, prefixes=(48, 64)),
    "relu": dict(architecture="relu", sparsity=2.0),
    "jumprelu": dict(architecture="jumprelu", sparsity=1.0),
    "gated": dict(architecture="gated", sparsity=1.0),
}


@pytest.mark.parametrize("case", RECOVERY)
def test_planted_dictionary_is_recovered(case, tmp_path):
    x, directions = planted(20_000, D, seed=0)
    sae = train(
        lambda: itertools.repeat(x), tmp_path, features=F, tokens=N * 800, batch=N, lr=3e-3,
        progress=False, **RECOVERY[case],
    )  # fmt: skip
    assert similarity(sae, directions) >= 0.95
    assert similarity(sae, directions) > 0.2 + similarity(Sae(sae.config), directions)
    assert sae.provenance.metrics["fvu"] < 0.3
    with torch.no_grad():
        left = (sae(x) - x).square().sum() / (x - x.mean(0)).square().sum()
    assert left < 0.35
