# SPDX-License-Identifier: Apache-2.0
"""Rows that are sparse sums of known atoms: what a dictionary should find in them is known."""

from __future__ import annotations

import torch
from torch import Tensor

# Rows drawn at a time: bounds the scores [rows, atoms].
_BLOCK = 1 << 14


def planted(
    rows: int, width: int, atoms: int, active: int, *, noise: float = 0.01, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Return x [rows, width] = sum over `active` atoms of c a + noise n, and the atoms a.

    In each row the atoms are drawn without replacement, all alike, c uniform in [1, 2], n standard
    normal. Atoms are random directions of norm 1. Deterministic in the arguments; float32.

    Args:
        rows: number of rows.
        width: d of a row.
        atoms: number of atoms.
        active: of a row.
        noise: standard deviation of the noise in each of the d directions.
        seed: of everything.

    Returns:
        x [rows, width] and the atoms [atoms, width].
    """
    g = torch.Generator().manual_seed(seed)
    table = torch.randn(atoms, width, generator=g)
    table /= table.norm(dim=1, keepdim=True)
    x = torch.empty(rows, width)
    for block in x.split(_BLOCK):
        scores = torch.rand(len(block), atoms, generator=g)
        chosen = scores.topk(active, 1).indices
        weight = 1 + torch.rand(len(block), active, generator=g)
        block.copy_(
            torch.nn.functional.embedding_bag(chosen, table, per_sample_weights=weight, mode="sum")
        )
        block.add_(torch.randn(len(block), width, generator=g), alpha=noise)
    return x, table


def found(atoms: Tensor, w_dec: Tensor, cosine: float) -> float:
    """Return the share of the atoms [A, d] that a row of w_dec [F, d] meets at this cosine."""
    rows = torch.nn.functional.normalize(w_dec.detach().to(atoms), dim=1)
    return float(((atoms @ rows.T).amax(1) >= cosine).double().mean())
