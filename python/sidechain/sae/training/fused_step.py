# SPDX-License-Identifier: Apache-2.0
"""A training step without autograd and without gradient tensors, for selecting architectures.

encode and select, decode with loss and the gradient of the values, update each feature's rows once:
between these, sparse codes are all there is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops import (
    AdamOptions,
    AdamState,
    CodeGroup,
    GradientInputs,
    SaeWeights,
    sae_gradient_square,
    sae_update_,
)
from ..architectures.dead import dead_codes
from ..architectures.registry import implementation
from ..architectures.selecting import first_of, smallest_selected
from ..model import Codes
from .autograd_step import follow_threshold
from .groups import Group, compared, nested
from .optimiser import adam_, clip_factor
from .rows import Rows
from .state import TrainState
from .train_metrics import Outcome


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
    state.step += 1
    _update(state, state.mesh.gather_rows(x), [_whole(state, g) for g in groups])
    if "threshold" in state.weights:
        follow_threshold(state, smallest_selected(main))
    return outcome


def _forward(state: TrainState, x: Tensor, target: Tensor) -> tuple[list[Group], Codes]:
    train, weights = state.train, {**state.weights, "b_pre": state.b_pre}
    k, options = state.schedule.k(state.step), {"precision": train.precision}
    kind = implementation(state.config.architecture)
    codes = kind.select(state, train.multi_k or k, x, weights, **options)
    main = codes if train.multi_k is None else _first(state, codes, k)
    groups = [(nested if state.config.prefixes else compared)(state, main, target)]
    if train.multi_k is not None:
        groups.append(compared(state, codes, target, train.multi_weight))
    aux_k = min(state.schedule.aux_k, state.config.features)
    if aux_k and state.dead_total:
        compact = {**weights, "w_enc": weights["w_enc"][state.dead]}
        dead = dead_codes(state, aux_k, x, compact)
        share = train.aux_weight * min(1.0, state.dead_total / aux_k)
        dead = _renumbered(dead, state.dead)
        groups.append(compared(state, dead, groups[0].residual, share, biased=False))
    return groups, main


def _first(state: TrainState, codes: Codes, k: int) -> Codes:
    """Return the k largest of sorted codes, over all slices of the features."""
    first = first_of(state, codes, k)
    return Codes(first.values.contiguous(), first.indices.contiguous(), None)


def _renumbered(codes: Codes, numbers: Tensor) -> Codes:
    """Number codes of a list of features as those features are."""
    if not len(numbers):
        return codes
    indices = numbers[codes.indices.clamp(min=0).long()].int()
    return codes._replace(indices=torch.where(codes.indices < 0, -1, indices))


def _whole(state: TrainState, group: Group) -> Group:
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


def _update(state: TrainState, x: Tensor, groups: list[Group]) -> None:
    """Update the rows of every feature, then `b_dec`, whose gradient is a sum over all of them."""
    weights, train, mesh = state.weights, state.train, state.mesh
    bias_grad = torch.stack([g.bias_grad for g in groups if g.biased]).sum(0)
    tied = state.fixed_b_pre is None
    own = SaeWeights(weights["w_enc"], weights["w_dec"], weights["b_enc"], state.b_pre)
    inputs = GradientInputs(
        x,
        [_of_levels(state, g) for g in groups],
        project=state.config.unit_norm,
        prefixes=state.config.prefixes,
        first_feature=state.first,
    )
    scale = None
    if train.clip is not None:
        total = mesh.sum_features(sae_gradient_square(own, inputs).double())
        whole = bias_grad + _pre_gradient(state, groups) if tied else bias_grad
        scale = clip_factor(total + whole.double().square().sum(), train.clip).float()
    pre_grad = torch.zeros_like(weights["b_dec"]) if tied else None
    adam = AdamOptions(
        torch.full((1,), state.schedule.lr(state.step - 1), device=x.device),
        torch.full((1,), state.step, dtype=torch.int64, device=x.device),
        *train.betas,
        train.eps,
        train.weight_decay,
        scale,
    )
    sae_update_(
        own,
        _adam_state(state),
        inputs,
        adam,
        unit_norm=state.config.unit_norm,
        last_fired=state.last_fired,
        b_pre_grad=pre_grad,
    )
    if pre_grad is not None:
        bias_grad = bias_grad + mesh.sum_features(pre_grad)
    if scale is not None:
        bias_grad = bias_grad * scale
    adam_(state, {"b_dec": bias_grad})


def _of_levels(state: TrainState, group: Group) -> CodeGroup:
    """Return the group as `sae_update_` takes it: features of the whole dictionary, all errors."""
    values, indices, offsets = group.codes
    error, levels = group.error, len(state.config.prefixes)
    if error.dim() == 3:
        error = error.transpose(0, 1)
    elif levels:
        error = error.expand(levels, *error.shape)
    numbers = indices + state.first if state.first else indices
    return CodeGroup(values, numbers, group.dvalues, error, offsets)


def _pre_gradient(state: TrainState, groups: list[Group]) -> Tensor:
    """Return the gradient of a tied `b_pre` before the update, [d_in]: -sum_f g_b[f] w_enc[f]."""
    sums = torch.zeros(state.size + 1, dtype=torch.float64, device=state.device)
    for group in groups:
        values, indices, _ = group.codes
        place = torch.where(values != 0, indices, state.size).flatten().long()
        sums.index_add_(0, place, group.dvalues.flatten().double())
    grad = -(sums[:-1].float() @ state.weights["w_enc"])
    return state.mesh.sum_features(grad)


def _adam_state(state: TrainState) -> AdamState:
    enc, dec, bias = (state.adam[name] for name in ("w_enc", "w_dec", "b_enc"))
    return AdamState(*enc, *dec, *bias)
