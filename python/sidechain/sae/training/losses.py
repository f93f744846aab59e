# SPDX-License-Identifier: Apache-2.0
"""The loss of each architecture as a differentiable function of a tile of rows."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...ops import Encoder, sparse_decode, topk_encode
from ..model import Codes
from .select import keep_batch_largest, keep_row_largest
from .state import TrainState

TANH_SCALE = 4.0
# Pre-activations of dead features held at a time: a tile that stays in the last-level cache.
_TILE = 1 << 22
# Share of the last batch's smallest value at which a batch is screened first.
_GUESS = 0.95


class Loss(NamedTuple):
    """Of a tile of rows.

    Attributes:
        total: to be differentiated.
        error: x_hat - target [n, d_out], detached.
        active: number of active features here.
        fired: [F'] number of rows in which each own feature is active.
        smallest: smallest value kept, inf where none is; for the running threshold.
    """

    total: Tensor
    error: Tensor
    active: Tensor
    fired: Tensor
    smallest: Tensor


def tile_loss(state: TrainState, leaves: dict[str, Tensor], x: Tensor, target: Tensor) -> Loss:
    """Return the loss of rows x [n, d_in], target [n, d_out], as part of the batch's.

    Args:
        state: settings and counters.
        leaves: weights by name, and `b_pre`, a leaf of its own even where it equals `b_dec`: its
            gradient is a sum over features, that of `b_dec` is not.
        x: normalised input.
        target: normalised target.
    """
    if state.config.architecture in ("topk", "batch_topk", "matryoshka"):
        return _selecting(state, leaves, x, target)
    return {"relu": _relu, "jumprelu": _jumprelu, "gated": _gated}[state.config.architecture](
        state, leaves, x, target
    )


def selection(state: TrainState, k: int, x: Tensor, w: dict[str, Tensor], **options: Any) -> Codes:
    """Return the codes of own features among the k largest of each row, or N k of the batch."""
    mesh, config = state.mesh, state.config
    encoder = Encoder(w["w_enc"], w["b_enc"], w["b_pre"])
    if config.architecture == "topk":
        codes = topk_encode(x, encoder, k=min(k, state.size), **options)
        return keep_row_largest(codes, k, mesh)
    offered = min(k * mesh.data, state.size)
    codes = topk_encode(x, encoder, k=offered, mode="batch_topk", guess=_guess(state), **options)
    return keep_batch_largest(codes, k * len(x) * mesh.data, mesh, config.features)


def _guess(state: TrainState) -> Tensor | None:
    """Return where the screen of a batch starts [1]: it decides the time of a step, not its result.

    Saves a tenth of the step at N 1024, d 768, F 12288, k 32 (CPU, compared
    with the op's own estimate).
    One process alone: a slice offers more than the batch keeps.
    """
    if state.smallest is None or state.mesh.world > 1:
        return None
    start = _GUESS * state.smallest.float()
    return torch.where(start.isfinite(), start, 0.0).reshape(1)


def _selecting(state: TrainState, w: dict[str, Tensor], x: Tensor, target: Tensor) -> Loss:
    k = state.schedule.k(state.step)
    multi = state.train.multi_k
    codes = selection(state, multi or k, x, w)
    main = codes if multi is None else keep_row_largest(first_of(codes, k), k, state.mesh)
    if state.config.prefixes:
        total, error = _nested(state, w, main, target)
    else:
        error = _decoded(state, w, main) - target
        total = _squares(state, error)
    if multi is not None:
        total = total + state.train.multi_weight * _squares(
            state, _decoded(state, w, codes) - target
        )
    error = error.detach()
    total = total + auxiliary(state, w, x, error)
    fired = count_fired(main, state.size)
    return Loss(total, error, fired.sum(), fired, smallest_kept(main))


def first_of(codes: Codes, k: int) -> Codes:
    """Return the first k of sorted codes [N, K]."""
    return Codes(codes.values[:, :k], codes.indices[:, :k], None)


def _nested(
    state: TrainState, w: dict[str, Tensor], codes: Codes, target: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean over prefixes of the loss of the codes below each (arXiv 2503.17547)."""
    number = codes.indices + state.first
    error = w["b_dec"] - target
    total = error.new_zeros(())
    below = 0
    for size in state.config.prefixes:
        inside = (codes.indices >= 0) & (number >= below) & (number < size)
        part = Codes(
            torch.where(inside, codes.values, 0.0),
            torch.where(inside, codes.indices, -1),
            codes.offsets,
        )
        error = error + _decoded(state, w, part, bias=False)
        total = total + _squares(state, error) / len(state.config.prefixes)
        below = size
    return total, error


def auxiliary(state: TrainState, w: dict[str, Tensor], x: Tensor, error: Tensor) -> Tensor:
    """AuxK (arXiv 2406.04093, appendix A.2): dead features reconstruct what is left over.

    The product runs over the dead rows alone, compact, and the gradient reaches their encoder.
    With fewer dead features than `aux_k` the loss is scaled by their share.
    """
    k = min(state.schedule.aux_k, state.config.features)
    if not k or not state.dead_total:
        return x.new_zeros(())
    codes = dead_codes(state, k, x, {**w, "w_enc": w["w_enc"][state.dead]})
    table = w["w_dec"][state.dead]
    part = sparse_decode(codes.values, codes.indices, table) if len(table) else error * 0
    left = state.mesh.sum_features_once(part) + error
    return state.train.aux_weight * min(1.0, state.dead_total / k) * _squares(state, left)


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


def _relu(state: TrainState, w: dict[str, Tensor], x: Tensor, target: Tensor) -> Loss:
    values = _preactivations(w, x).relu()
    error = _dense(state, w, values) - target
    total = _squares(state, error) + _penalty(state, (values * _lengths(state, w)).sum())
    return _dense_loss(total, error, values)


def _jumprelu(state: TrainState, w: dict[str, Tensor], x: Tensor, target: Tensor) -> Loss:
    z, threshold, width = _preactivations(w, x), w["threshold"], state.schedule.bandwidth
    values: Tensor = _Jump.apply(z, threshold, width)  # type: ignore[no-untyped-call]
    error = _dense(state, w, values) - target
    if state.train.penalty == "l0":
        count: Tensor = _Step.apply(z, threshold, width)  # type: ignore[no-untyped-call]
        total = _penalty(state, count.sum())
    else:
        lengths = _lengths(state, w)
        total = _penalty(state, (TANH_SCALE * values * lengths).tanh().sum())
        total = (
            total
            + 0.5
            * state.row_weight
            * state.train.pre_act
            * ((threshold - z).relu() * lengths).sum()
        )
    return _dense_loss(_squares(state, error) + total, error, values)


def _gated(state: TrainState, w: dict[str, Tensor], x: Tensor, target: Tensor) -> Loss:
    """Gated dictionary (arXiv 2404.16014, eq. 8): the gate learns through its own reconstruction.

    The third term decodes relu(g) with a decoder that it does not change.
    """
    projected = (x - w["b_pre"]) @ w["w_enc"].T
    gate = projected + w["b_gate"]
    values = (gate > 0) * (w["r_mag"].exp() * projected + w["b_enc"]).relu()
    error = _dense(state, w, values) - target
    frozen = {"w_dec": w["w_dec"].detach(), "b_dec": w["b_dec"].detach()}
    opened = gate.relu()
    total = _squares(state, error) + _squares(state, _dense(state, frozen, opened) - target)
    total = total + _penalty(state, (opened * _lengths(state, w)).sum())
    return _dense_loss(total, error, values)


def _preactivations(w: dict[str, Tensor], x: Tensor) -> Tensor:
    return (x - w["b_pre"]) @ w["w_enc"].T + w["b_enc"]


def _lengths(state: TrainState, w: dict[str, Tensor]) -> Tensor:
    """Norms of the decoder rows; ones where they are kept at one (their gradient is projected)."""
    if state.config.unit_norm:
        return torch.ones_like(w["b_enc"])
    return w["w_dec"].norm(dim=1)


def _decoded(state: TrainState, w: dict[str, Tensor], codes: Codes, *, bias: bool = True) -> Tensor:
    part = sparse_decode(codes.values, codes.indices, w["w_dec"], offsets=codes.offsets)
    whole = state.mesh.sum_features_once(part)
    return whole + w["b_dec"] if bias else whole


def _dense(state: TrainState, w: dict[str, Tensor], values: Tensor) -> Tensor:
    return state.mesh.sum_features_once(values @ w["w_dec"]) + w["b_dec"]


def _squares(state: TrainState, error: Tensor) -> Tensor:
    return 0.5 * state.row_weight * error.square().sum()


def _penalty(state: TrainState, value: Tensor) -> Tensor:
    return 0.5 * state.row_weight * state.schedule.sparsity(state.step) * value


def _dense_loss(total: Tensor, error: Tensor, values: Tensor) -> Loss:
    fired = (values > 0).sum(0)
    nothing = torch.full((), torch.inf, dtype=error.dtype, device=error.device)
    return Loss(total, error.detach(), fired.sum(), fired, nothing)


def count_fired(codes: Codes, size: int) -> Tensor:
    """Return in how many rows each of `size` features is active, [size] int64."""
    counts = torch.zeros(size + 1, dtype=torch.int64, device=codes.values.device)
    place = torch.where(codes.indices < 0, size, codes.indices).flatten().long()
    return counts.index_add_(0, place, (codes.values > 0).flatten().long())[:size]


def smallest_kept(codes: Codes) -> Tensor:
    """Return the smallest positive value, inf if there is none."""
    values = codes.values.detach()
    if not values.numel():
        return torch.full((), torch.inf, dtype=values.dtype, device=values.device)
    return torch.where(values > 0, values, torch.inf).amin()


class _Jump(torch.autograd.Function):
    """v = z [z > t], t >= 0, with the rectangle kernel for t (arXiv 2407.14435, eq. 11)."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.width = width
        return z * (z > threshold)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        z, threshold = ctx.saved_tensors
        near = ((z - threshold).abs() < ctx.width / 2) * grads[0]
        return (z > threshold) * grads[0], -(threshold / ctx.width) * near.sum(0), None


class _Step(torch.autograd.Function):
    """[z > t] with the rectangle kernel for t (arXiv 2407.14435, eq. 12); none for z."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.width = width
        return (z > threshold).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None]:
        z, threshold = ctx.saved_tensors
        near = ((z - threshold).abs() < ctx.width / 2) * grads[0]
        return None, -near.sum(0) / ctx.width, None
