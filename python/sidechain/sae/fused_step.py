# SPDX-License-Identifier: Apache-2.0
"""A training step without autograd and without gradient tensors, for topk and batch_topk.

encode and select, decode with loss and the gradient of the values, update each feature's rows once:
between these, sparse codes are all there is.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..ops import (
    SaeCodes,
    SaeMoments,
    sae_gradient_square,
    sae_update_,
    sparse_decode,
    sparse_decode_loss,
)
from .autograd_step import follow_threshold
from .losses import dead_codes, first_of, selection, smallest_kept
from .metrics import Outcome
from .model import Codes
from .optimiser import adam_, clip_factor
from .select import keep_row_largest
from .state import Rows, TrainState


class _Group(NamedTuple):
    """Codes of own features, and what they leave.

    Attributes:
        codes: numbered within the slice.
        error: [N', d_out], times the weight of the row in the loss.
        dvalues: gradient of the loss in the values.
        row_loss: |e_n|^2 [N'], not weighted.
        biased: whether `b_dec` is part of the reconstruction.
    """

    codes: Codes
    error: Tensor
    dvalues: Tensor
    row_loss: Tensor
    biased: bool


@torch.no_grad()
def fused_step(state: TrainState, rows: Rows) -> Outcome:
    """Train on one batch; the same step as `autograd_step`, up to rounding.

    Args:
        state: changed in place; its `step` is the number of this step, from 0.
        rows: this process's rows of the batch.
    """
    x, target = state.normalised(rows)
    groups, main = _forward(state, x, target)
    outcome = Outcome(groups[0].row_loss, target, (main.values > 0).sum())
    smallest = smallest_kept(main)
    state.step += 1
    _update(state, state.mesh.gather_rows(x), [_whole(state, g) for g in groups])
    if state.config.architecture == "batch_topk":
        follow_threshold(state, smallest)
    return outcome


def _forward(state: TrainState, x: Tensor, target: Tensor) -> tuple[list[_Group], Codes]:
    train, weights = state.train, {**state.weights, "b_pre": state.b_pre}
    k, options = state.schedule.k(state.step), {"precision": train.precision}
    codes = selection(state, train.multi_k or k, x, weights, **options)
    main = codes if train.multi_k is None else _first(state, codes, k)
    groups = [_group(state, main, target, 1.0)]
    if train.multi_k is not None:
        groups.append(_group(state, codes, target, train.multi_weight))
    aux_k = min(state.schedule.aux_k, state.config.features)
    if aux_k and state.dead_total:
        compact = {**weights, "w_enc": weights["w_enc"][state.dead]}
        dead = dead_codes(state, aux_k, x, compact, **options)
        share = train.aux_weight * min(1.0, state.dead_total / aux_k)
        # The residual is target - x_hat: minus the error of the main codes, before its weight.
        left = groups[0].error / -state.row_weight
        groups.append(_group(state, _renumbered(dead, state.dead), left, share, biased=False))
    return groups, main


def _first(state: TrainState, codes: Codes, k: int) -> Codes:
    """The k largest of sorted codes, over all slices of the features."""
    kept = keep_row_largest(first_of(codes, k), k, state.mesh)
    return Codes(kept.values.contiguous(), kept.indices.contiguous(), None)


def _renumbered(codes: Codes, numbers: Tensor) -> Codes:
    """Codes of a list of features, numbered as those features are."""
    if not len(numbers):
        return codes
    indices = numbers[codes.indices.clamp(min=0).long()].int()
    return codes._replace(indices=torch.where(codes.indices < 0, -1, indices))


def _group(
    state: TrainState, codes: Codes, target: Tensor, share: float, *, biased: bool = True
) -> _Group:
    """Decode codes and compare with the target; the weight of the loss goes into the error."""
    weight = share * state.row_weight
    w_dec, b_dec = state.weights["w_dec"], state.weights["b_dec"] if biased else None
    if state.mesh.features == 1:
        error, row_loss, dvalues = sparse_decode_loss(
            codes.values, codes.indices, w_dec, b_dec, target, offsets=codes.offsets
        )
        return _Group(codes, error.mul_(weight), dvalues.mul_(weight), row_loss, biased)
    # The other slices decode a part of x_hat: the error is known only after their sum.
    part = sparse_decode(codes.values, codes.indices, w_dec, offsets=codes.offsets)
    error = state.mesh.sum_features(part.clone()) - target
    if b_dec is not None:
        error += b_dec
    row_loss = error.square().sum(1)
    error *= weight
    # Codes of nothing against -error leave exactly error: its products with the rows, no more.
    _, _, dvalues = sparse_decode_loss(
        torch.zeros_like(codes.values), codes.indices, w_dec, None, -error, offsets=codes.offsets
    )
    return _Group(codes, error, dvalues, row_loss, biased)


def _whole(state: TrainState, group: _Group) -> _Group:
    """Join the row slices of a group: every process updates its features from all rows."""
    mesh = state.mesh
    if mesh.data == 1:
        return group
    values, indices, offsets = group.codes
    if offsets is None:
        codes = Codes(mesh.gather_rows(values), mesh.gather_rows(indices), None)
        dvalues = mesh.gather_rows(group.dvalues)
    else:
        values, indices, dvalues = mesh.gather_rows_ragged(values, indices, group.dvalues)
        lengths = mesh.gather_rows(offsets.diff())
        codes = Codes(values, indices, torch.nn.functional.pad(lengths.cumsum(0), (1, 0)))
    return group._replace(codes=codes, dvalues=dvalues, error=mesh.gather_rows(group.error))


def _update(state: TrainState, x: Tensor, groups: list[_Group]) -> None:
    """Update the rows of every feature, then `b_dec`, whose gradient is a sum over all of them."""
    weights, train, mesh = state.weights, state.train, state.mesh
    codes = [
        SaeCodes(g.codes.values, g.codes.indices, g.dvalues, g.error, g.codes.offsets)
        for g in groups
    ]
    bias_grad = torch.stack([g.error.sum(0) for g in groups if g.biased]).sum(0)
    tied = state.fixed_b_pre is None
    scale = None
    if train.clip is not None:
        square = sae_gradient_square(
            weights["w_enc"], weights["w_dec"], x, codes, b_pre=state.b_pre,
            project=state.config.unit_norm,
        )  # fmt: skip
        total = mesh.sum_features(square.double())
        whole = bias_grad + _pre_gradient(state, codes) if tied else bias_grad
        scale = clip_factor(total + whole.double().square().sum(), train.clip).float()
    pre_grad = torch.zeros_like(weights["b_dec"]) if tied else None
    sae_update_(
        weights["w_enc"], weights["w_dec"], weights["b_enc"], _moments(state), x, codes,
        lr=torch.full((1,), state.schedule.lr(state.step - 1), device=x.device),
        step=torch.full((1,), state.step, dtype=torch.int64, device=x.device),
        b_pre=state.b_pre, betas=train.betas, eps=train.eps, weight_decay=train.weight_decay,
        unit_norm=state.config.unit_norm, project=state.config.unit_norm, clip_scale=scale,
        last_fired=state.last_fired, b_pre_grad=pre_grad,
    )  # fmt: skip
    if pre_grad is not None:
        bias_grad = bias_grad + mesh.sum_features(pre_grad)
    if scale is not None:
        bias_grad = bias_grad * scale
    adam_(state, {"b_dec": bias_grad})


def _pre_gradient(state: TrainState, codes: list[SaeCodes]) -> Tensor:
    """Gradient of a tied `b_pre` before the update, [d_in]: -sum_f g_b[f] w_enc[f]."""
    sums = torch.zeros(state.size + 1, dtype=torch.float64, device=state.device)
    for group in codes:
        place = torch.where(group.values != 0, group.indices, state.size).flatten().long()
        sums.index_add_(0, place, group.dvalues.flatten().double())
    grad = -(sums[:-1].float() @ state.weights["w_enc"])
    return state.mesh.sum_features(grad)


def _moments(state: TrainState) -> SaeMoments:
    enc, dec, bias = (state.moments[name] for name in ("w_enc", "w_dec", "b_enc"))
    return SaeMoments(*enc, *dec, *bias)
