# SPDX-License-Identifier: Apache-2.0
"""AuxK (arXiv 2406.04093, appendix A.2): dead features reconstruct the residual."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...ops import Codes, sparse_decode
from .select import keep_row_largest
from .terms import squares

if TYPE_CHECKING:
    from ..training.state import TrainState

# Pre-activations of dead features held at a time: a tile that stays in the last-level cache.
_TILE = 1 << 22


def auxiliary(state: TrainState, w: dict[str, Tensor], x: Tensor, error: Tensor) -> Tensor:
    """Return the loss of the dead features that reconstruct the residual -error.

    The product runs over the dead rows alone, compact, and the gradient reaches their encoder.
    With fewer dead features than `aux_k` the loss is scaled by their share.
    """
    k = min(state.schedule.aux_k, state.config.features)
    if not k or not state.dead_total:
        return x.new_zeros(())
    codes = dead_codes(state, k, x, {**w, "w_enc": w["w_enc"][state.dead]})
    table = w["w_dec"][state.dead]
    part = sparse_decode(codes.values, codes.indices, table) if len(table) else error * 0
    residual = state.mesh.sum_features_once(part) + error
    return state.train.aux_weight * min(1.0, state.dead_total / k) * squares(state, residual)


def dead_codes(state: TrainState, k: int, x: Tensor, w: dict[str, Tensor]) -> Codes:
    """Return codes [N, <= k] of dead features alone, numbered as in `state.dead`; differentiable.

    `aux_k` is a large share of the dead features. `topk_encode` would value most of them one by one
    in float64: a plain product of the compact rows and `torch.topk` make a step of 0.53 s one of
    0.41 s at 1229 dead, 0.70 s one of 0.60 s at 6144 (CPU, N 1024, d 768, F 12288, k 384).

    Args:
        state: its `dead` are the features.
        k: number to keep over all slices of the features.
        x: normalised input.
        w: b_enc of all own features, b_pre, and w_enc of the dead ones only.
    """
    count = len(state.dead)
    width = k if state.mesh.features > 1 else min(k, count)
    values = x.new_zeros(len(x), width)
    indices = torch.full((len(x), width), -1, dtype=torch.int32, device=x.device)
    if count:
        codes = _largest(x - w["b_pre"], w["w_enc"], w["b_enc"][state.dead], min(k, count))
        pad = (0, width - codes.values.shape[1])
        values = torch.nn.functional.pad(codes.values, pad)
        indices = torch.nn.functional.pad(codes.indices, pad, value=-1)
    return keep_row_largest(Codes(values, indices, None), k, state.mesh)


def _largest(u: Tensor, w_enc: Tensor, b_enc: Tensor, k: int) -> Codes:
    """Return the k largest positive w_enc u + b_enc of every row, in any order."""
    tiles = u.split(max(1, _TILE // len(w_enc)))
    found = [torch.addmm(b_enc, tile, w_enc.T).topk(k, sorted=False) for tile in tiles]
    values = torch.cat([top.values for top in found])
    kept = ~(values <= 0)  # NaN stays
    indices = torch.cat([top.indices for top in found])
    return Codes(torch.where(kept, values, 0.0), torch.where(kept, indices, -1).int(), None)
