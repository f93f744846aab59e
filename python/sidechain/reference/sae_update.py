# SPDX-License-Identifier: Apache-2.0
"""Reference of ``sae_update_``: gradients of a sparse autoencoder from its codes, then Adam.

Sources: projection and unit norm, Bricken et al. 2023; Adam, arXiv 1412.6980, with the decoupled
decay of arXiv 1711.05101; the integer mix is `lowbias32` (Wellons, public domain).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .codes import accumulator, add_scaled_rows, entries

if TYPE_CHECKING:
    # Types of arguments: `ops` stands above.
    from ..ops.sae_structs import AdamOptions, AdamState, GradientInputs, SaeWeights

_WORD = 0xFFFFFFFF


class Gradients(NamedTuple):
    """Dense gradients, which the kernels never hold."""

    enc: Tensor  # [F, d_in]
    dec: Tensor  # [F, d_out]
    bias: Tensor  # [F]
    fired: Tensor  # [F] bool: the feature has an entry in the first group


def gradients(weights: SaeWeights, inputs: GradientInputs) -> Gradients:
    """Sum the gradients of all groups; shapes and formulas as in `sidechain.ops.sae_update_`."""
    w_enc, w_dec, b_pre = weights.w_enc, weights.w_dec, weights.b_pre
    features, acc, device = w_dec.shape[0], accumulator(w_dec), w_dec.device
    enc = torch.zeros(w_enc.shape, dtype=acc, device=device)
    dec = torch.zeros(w_dec.shape, dtype=acc, device=device)
    bias = torch.zeros(features, dtype=acc, device=device)
    fired = torch.zeros(features, dtype=torch.bool, device=device)
    x, prefixes, first = inputs.x.to(acc), inputs.prefixes, inputs.first_feature
    centred = x if b_pre is None else x - b_pre
    bounds = torch.tensor(prefixes or [0], dtype=torch.int64, device=device)
    for number, group in enumerate(inputs.codes if features and x.shape[0] else ()):
        e = entries(group.values, group.indices, group.offsets, features, first)
        active = e.valid & (e.value != 0)
        dv = torch.where(active, group.dvalues.reshape(-1), 0.0)
        weight = group.row_weight
        v = e.value if weight is None else e.value * weight.index_select(0, e.row)
        flat, row = group.error, e.row
        if prefixes:  # [P, N, d]: every feature reads the error of the first prefix that holds it
            level = torch.searchsorted(bounds, e.feature + first, right=True)
            row = row + level * flat.shape[1]
            flat = flat.flatten(0, 1)
        dec = add_scaled_rows(dec, e.feature, v, active, flat, row)
        enc = add_scaled_rows(enc, e.feature, dv, active, centred, e.row)
        bias = bias.index_add(0, e.feature, dv)
        if number == 0:
            count = torch.zeros(features, dtype=torch.int64, device=device)
            fired = count.index_add(0, e.feature, active.long()) > 0
    if inputs.project:
        along = (dec * w_dec).sum(-1) / torch.where(
            (w_dec == 0).all(-1), 1.0, w_dec.square().sum(-1)
        )
        dec = dec - along[:, None] * w_dec
    return Gradients(enc, dec, bias, fired)


def sae_gradient_square(weights: SaeWeights, inputs: GradientInputs) -> Tensor:
    """Return the sum of squares [1] of the gradients that `sae_update_` would use."""
    g = gradients(weights, inputs)
    # Row by row first: torch cuts one large sum differently for another number of threads.
    total = g.enc.square().sum(1).sum() + g.dec.square().sum(1).sum()
    return (total if weights.b_enc is None else total + g.bias.square().sum()).reshape(1)


def sae_update_(
    weights: SaeWeights,
    state: AdamState,
    inputs: GradientInputs,
    adam: AdamOptions,
    unit_norm: bool,
    last_fired: Tensor | None,
    b_pre_grad: Tensor | None,
) -> None:
    """Do one step in place; the contract is that of `sidechain.ops.sae_update_`."""
    g = gradients(weights, inputs)
    w_enc, w_dec, b_enc, _ = weights
    if b_pre_grad is not None:
        b_pre_grad.copy_(-(g.bias @ w_enc))
    if last_fired is not None:
        last_fired.copy_(torch.where(g.fired, adam.step, last_fired))

    feature = torch.arange(w_enc.shape[0], device=w_enc.device) + inputs.first_feature
    _adam_(adam, w_enc, (state.enc_mean, state.enc_square), g.enc, 2 * feature)
    _adam_(adam, w_dec, (state.dec_mean, state.dec_square), g.dec, 2 * feature + 1)
    if b_enc is not None and state.bias_mean is not None and state.bias_square is not None:
        whole = adam._replace(weight_decay=0.0)
        _adam_(whole, b_enc, (state.bias_mean, state.bias_square), g.bias, None)
    if unit_norm:
        norm = torch.linalg.vector_norm(w_dec, dim=-1, keepdim=True)
        w_dec.copy_(torch.where(norm != 0, w_dec / norm, w_dec))


def _adam_(
    adam: AdamOptions,
    weight: Tensor,
    statistics: tuple[Tensor, Tensor],
    grad: Tensor,
    key: Tensor | None,
) -> None:
    """Take one step of a weight [F, ...] and its mean and mean square.

    Args:
        adam: numbers of the step.
        weight: written.
        statistics: written.
        grad: in the precision sums are taken in, before clipping.
        key: [F], of the bits that round a row of bfloat16.
    """
    (mean, square), acc, t = statistics, accumulator(weight), adam.step.double()
    grad = grad if adam.clip_scale is None else grad * adam.clip_scale
    size = (adam.lr.double() / (1.0 - adam.beta1**t)).to(acc)
    correction = (1.0 - adam.beta2**t).sqrt().to(acc)
    new_mean = mean.to(acc) + (grad - mean.to(acc)) * (1.0 - adam.beta1)
    new_square = square.to(acc) * adam.beta2 + grad.square() * (1.0 - adam.beta2)
    decayed = weight * (1.0 - adam.lr.double() * adam.weight_decay).to(acc)
    weight.copy_(decayed - size * (new_mean / (new_square.sqrt() / correction + adam.eps)))
    if mean.dtype == torch.bfloat16 and key is not None:
        noise = rounding_noise(adam.step, key, weight.shape[1])
        new_mean = round_stochastically(new_mean, noise & 0xFFFF)
        new_square = round_stochastically(new_square, noise >> 16)
    mean.copy_(new_mean)
    square.copy_(new_square)


def rounding_noise(step: Tensor, key: Tensor, width: int) -> Tensor:
    """32 random bits for each element [len(key), width], a pure function of its arguments.

    mix(mix(mix(step) ^ key) + column), all modulo 2^32. The low half rounds the mean, the high half
    the mean square.
    """
    row = _mix(_mix(step & _WORD) ^ (key & _WORD))
    column = torch.arange(width, device=key.device)
    return _mix((row[:, None] + column) & _WORD)


def round_stochastically(value: Tensor, noise: Tensor) -> Tensor:
    """Round float32 to bfloat16, up with the probability of the part that is cut off.

    Adds 16 random bits below the last bit that is kept, then cuts. Infinities and NaN stay.
    """
    bits = value.float().contiguous().view(torch.int32).long() & _WORD
    rounded = ((bits + noise) & 0xFFFF0000).to(torch.int32).view(torch.float32)
    return torch.where(value.isfinite(), rounded, value).to(torch.bfloat16)


def _mix(x: Tensor) -> Tensor:
    """Permute 32-bit words held in int64."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _WORD
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _WORD
    return x ^ (x >> 16)
