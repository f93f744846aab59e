# SPDX-License-Identifier: Apache-2.0
"""Reference of ``sae_update_``: gradients of a sparse autoencoder from its codes, then Adam.

Sources: projection and unit norm, Bricken et al. 2023; Adam, arXiv 1412.6980, with the decoupled
decay of arXiv 1711.05101; the integer mix is `lowbias32` (Wellons, public domain).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .codes import accumulator, add_scaled_rows, entries

_WORD = 0xFFFFFFFF


class Gradients(NamedTuple):
    """Dense gradients, which the kernels never hold."""

    enc: Tensor  # [F, d_in]
    dec: Tensor  # [F, d_out]
    bias: Tensor  # [F]
    active: Tensor  # [F] bool: the feature has an entry in some group
    fired: Tensor  # [F] int64: its entries in the first group


def gradients(
    w_enc: Tensor,
    w_dec: Tensor,
    x: Tensor,
    b_pre: Tensor | None,
    values: Sequence[Tensor],
    indices: Sequence[Tensor],
    offsets: Sequence[Tensor | None],
    dvalues: Sequence[Tensor],
    error: Sequence[Tensor],
    row_weight: Sequence[Tensor | None],
    project: bool,
    prefixes: Sequence[int],
    first_feature: int,
) -> Gradients:
    """Sum the gradients of all groups; shapes and formulas as in `sidechain.ops.sae_update_`."""
    features, acc, device = w_dec.shape[0], accumulator(w_dec), w_dec.device
    enc = torch.zeros(w_enc.shape, dtype=acc, device=device)
    dec = torch.zeros(w_dec.shape, dtype=acc, device=device)
    bias = torch.zeros(features, dtype=acc, device=device)
    count = torch.zeros(features, dtype=torch.int64, device=device)
    fired = count
    centred = x.to(acc) if b_pre is None else x.to(acc) - b_pre
    bounds = torch.tensor(prefixes or [0], dtype=torch.int64, device=device)
    for g in range(len(values) if features and x.shape[0] else 0):
        e = entries(values[g], indices[g], offsets[g], features, first_feature)
        active = e.valid & (e.value != 0)
        dv = torch.where(active, dvalues[g].reshape(-1), 0.0)
        weight = row_weight[g]
        v = e.value if weight is None else e.value * weight.index_select(0, e.row)
        flat, row = error[g], e.row
        if prefixes:  # [P, N, d]: every feature reads the error of the first prefix that holds it
            level = torch.searchsorted(bounds, e.feature + first_feature, right=True)
            row = row + level * flat.shape[1]
            flat = flat.flatten(0, 1)
        dec = add_scaled_rows(dec, e.feature, v, active, flat, row)
        enc = add_scaled_rows(enc, e.feature, dv, active, centred, e.row)
        bias = bias.index_add(0, e.feature, dv)
        count = count.index_add(0, e.feature, active.long())
        fired = count if g == 0 else fired
    if project:
        along = (dec * w_dec).sum(-1) / torch.where(
            (w_dec == 0).all(-1), 1.0, w_dec.square().sum(-1)
        )
        dec = dec - along[:, None] * w_dec
    return Gradients(enc, dec, bias, count > 0, fired)


def sae_gradient_square(
    w_enc: Tensor,
    w_dec: Tensor,
    x: Tensor,
    b_pre: Tensor | None,
    values: Sequence[Tensor],
    indices: Sequence[Tensor],
    offsets: Sequence[Tensor | None],
    dvalues: Sequence[Tensor],
    error: Sequence[Tensor],
    row_weight: Sequence[Tensor | None],
    bias: bool,
    project: bool,
    prefixes: Sequence[int],
    first_feature: int,
) -> Tensor:
    """Return the sum of squares [1] of the gradients that `sae_update_` would use."""
    g = gradients(
        w_enc, w_dec, x, b_pre, values, indices, offsets, dvalues, error, row_weight, project,
        prefixes, first_feature,
    )  # fmt: skip
    return _square(g, bias)


def sae_update_(
    w_enc: Tensor,
    w_dec: Tensor,
    b_enc: Tensor | None,
    enc_mean: Tensor,
    enc_square: Tensor,
    dec_mean: Tensor,
    dec_square: Tensor,
    bias_mean: Tensor | None,
    bias_square: Tensor | None,
    x: Tensor,
    b_pre: Tensor | None,
    values: Sequence[Tensor],
    indices: Sequence[Tensor],
    offsets: Sequence[Tensor | None],
    dvalues: Sequence[Tensor],
    error: Sequence[Tensor],
    row_weight: Sequence[Tensor | None],
    lr: Tensor,
    step: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    unit_norm: bool,
    project: bool,
    clip_scale: Tensor | None,
    prefixes: Sequence[int],
    first_feature: int,
    last_fired: Tensor | None,
    fire_count: Tensor | None,
    row_step: Tensor | None,
    enc_copy: Tensor | None,
    dec_copy: Tensor | None,
    b_pre_grad: Tensor | None,
    grad_square: Tensor | None,
) -> None:
    """Do one step in place; the contract is that of `sidechain.ops.sae_update_`."""
    g = gradients(
        w_enc, w_dec, x, b_pre, values, indices, offsets, dvalues, error, row_weight, project,
        prefixes, first_feature,
    )  # fmt: skip
    if b_pre_grad is not None:
        b_pre_grad.copy_(-(g.bias @ w_enc))
    if grad_square is not None:
        grad_square.copy_(_square(g, b_enc is not None))
    if last_fired is not None:
        last_fired.copy_(torch.where(g.fired > 0, step, last_fired))
    if fire_count is not None:
        fire_count.add_(g.fired)

    adam = _Adam(lr, step, beta1, beta2, eps, g.active, row_step)
    scale = torch.ones_like(lr) if clip_scale is None else clip_scale
    feature = torch.arange(w_enc.shape[0], device=w_enc.device) + first_feature
    adam.update_(w_enc, enc_mean, enc_square, g.enc * scale, weight_decay, 2 * feature)
    adam.update_(w_dec, dec_mean, dec_square, g.dec * scale, weight_decay, 2 * feature + 1)
    if b_enc is not None and bias_mean is not None and bias_square is not None:
        adam.update_(b_enc, bias_mean, bias_square, g.bias * scale, 0.0, None)
    if unit_norm:
        norm = torch.linalg.vector_norm(w_dec, dim=-1, keepdim=True)
        written = (norm != 0) & adam.written[:, None]
        w_dec.copy_(torch.where(written, w_dec / norm, w_dec))
    if row_step is not None:
        row_step.copy_(torch.where(adam.written, step, row_step))
    for copy, weight in ((enc_copy, w_enc), (dec_copy, w_dec)):
        if copy is not None:
            copy.copy_(torch.where(adam.written[:, None], weight.to(copy.dtype), copy))


class _Adam:
    """One step of Adam on [F, ...] tensors, lazy where the steps of the rows are given."""

    def __init__(
        self,
        lr: Tensor,
        step: Tensor,
        beta1: float,
        beta2: float,
        eps: float,
        active: Tensor,
        row_step: Tensor | None,
    ) -> None:
        t = step.double()
        self.lr, self.step, self.eps = lr, step, eps
        self.beta1, self.beta2 = beta1, beta2
        self.size = lr.double() / (1.0 - beta1**t)
        self.correction = (1.0 - beta2**t).sqrt()
        # Steps since a row was last written; all rows are written where laziness is off.
        self.written = torch.ones_like(active) if row_step is None else active
        waited = torch.ones_like(t) if row_step is None else (step - row_step).clamp(min=1).double()
        self.waited = waited.expand(active.shape[0])

    def update_(
        self,
        weight: Tensor,
        mean: Tensor,
        square: Tensor,
        grad: Tensor,
        weight_decay: float,
        key: Tensor | None,
    ) -> None:
        acc = accumulator(weight)

        def rows(t: Tensor) -> Tensor:  # [F] -> [F, 1] beside a matrix
            return t.to(acc).view(-1, *[1] * (weight.dim() - 1))

        written = rows(self.written) != 0
        old_mean = mean.to(acc) * rows(self.beta1 ** (self.waited - 1))
        old_square = square.to(acc) * rows(self.beta2 ** (self.waited - 1))
        new_mean = old_mean + (grad - old_mean) * (1.0 - self.beta1)
        new_square = old_square * self.beta2 + grad.square() * (1.0 - self.beta2)
        decayed = weight * rows((1.0 - self.lr.double() * weight_decay) ** self.waited)
        denominator = new_square.sqrt() / self.correction.to(acc) + self.eps
        new = decayed - self.size.to(acc) * (new_mean / denominator)
        weight.copy_(torch.where(written, new, weight))
        if mean.dtype == torch.bfloat16 and key is not None:
            noise = rounding_noise(self.step, key, weight.shape[1])
            new_mean = round_stochastically(new_mean, noise & 0xFFFF)
            new_square = round_stochastically(new_square, noise >> 16)
        mean.copy_(torch.where(written, new_mean, mean))
        square.copy_(torch.where(written, new_square, square))


def rounding_noise(step: Tensor, key: Tensor, width: int) -> Tensor:
    """32 random bits for each element [len(key), width], a pure function of its arguments.

    mix(mix(mix(step) ^ key) + column), all modulo 2^32. The low half rounds the first moment, the
    high half the second.
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


def _square(g: Gradients, bias: bool) -> Tensor:
    # Row by row first: torch cuts one large sum differently for another number of threads.
    total = g.enc.square().sum(1).sum() + g.dec.square().sum(1).sum()
    return (total + g.bias.square().sum() if bias else total).reshape(1)
