# SPDX-License-Identifier: Apache-2.0
"""Shared by the tests of foreign formats."""

import torch

D, F, K, N = 6, 10, 3, 40


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pieces():
    """Weights in our orientation, decoder rows of many norms, and inputs."""
    return {
        "w_enc": draw(F, D, seed=1),
        "w_dec": draw(F, D, seed=2),
        "b_enc": 0.3 * draw(F, seed=3),
        "b_dec": draw(D, seed=4),
        "x": draw(N, D, seed=5),
    }


def unit(rows):
    return rows / rows.norm(dim=1, keepdim=True)


def keep_top(z, k):
    kept = torch.zeros_like(z)
    top = z.topk(k, dim=-1)
    return kept.scatter(1, top.indices, top.values.clamp(min=0))


def dense_codes(sae, x):
    """What the loaded dictionary says, dense and in float64, from its parameters alone."""
    z = sae.preactivations(x)
    architecture = sae.config.architecture
    if architecture == "topk":
        return keep_top(z, sae.config.k)
    if architecture == "gated":
        open_ = (x - sae.b_pre) @ sae.w_enc.T + sae.b_gate > 0
        return torch.where(open_, z.clamp(min=0), 0.0)
    threshold = 0.0 if architecture == "relu" else sae.threshold
    return torch.where(z > threshold, z.clamp(min=0), 0.0)
