# SPDX-License-Identifier: Apache-2.0
"""AdamW on dense gradients, with what dictionaries add to it: projection, clipping, unit norm."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from .state import MATRICES, TrainState


def project(grad: Tensor, w_dec: Tensor) -> Tensor:
    """Return the gradient without its part along the rows of w_dec, which unit norm would undo."""
    square = w_dec.square().sum(1)
    along = (grad * w_dec).sum(1) / torch.where(square > 0, square, 1.0)
    return grad - along[:, None] * w_dec


def clip_scale(grads: dict[str, Tensor], state: TrainState) -> Tensor | None:
    """Return the factor [1] that brings the norm of all gradients to the limit; None without one.

    Gradients of features are counted over all processes, that of `b_dec` once.
    """
    if state.train.clip is None:
        return None
    own = sum(g.double().square().sum() for name, g in grads.items() if name != "b_dec")
    total = state.mesh.sum_features(torch.as_tensor(own)) + grads["b_dec"].double().square().sum()
    return clip_factor(total, state.train.clip).to(grads["b_dec"].dtype)


def clip_factor(square: Tensor, limit: float) -> Tensor:
    """Return min(1, limit / sqrt(square)) [1]."""
    return (limit / square.sqrt().clamp(min=1e-30)).clamp(max=1.0).reshape(1)


def apply(state: TrainState, grads: dict[str, Tensor]) -> None:
    """Take step number `state.step` (from 1) of AdamW on all weights, in place.

    The thresholds of jumprelu are trained through their logarithm (arXiv 2407.14435), with a
    learning rate of their own: the gradient is that of log(threshold) and the step multiplies.
    """
    weights = state.weights
    if state.config.unit_norm:
        grads["w_dec"] = project(grads["w_dec"], weights["w_dec"])
    threshold = weights.get("threshold")
    if "threshold" in grads and threshold is not None:
        grads["threshold"] = grads["threshold"] * threshold
    scale = clip_scale(grads, state)
    if scale is not None:
        for grad in grads.values():
            grad.mul_(scale)
    logarithm = None if threshold is None else torch.zeros_like(threshold)
    adam_(state, grads, instead={} if logarithm is None else {"threshold": logarithm})
    if "threshold" in grads and threshold is not None and logarithm is not None:
        threshold.mul_(logarithm.exp())
    if state.config.unit_norm:
        renormalise(weights["w_dec"])


def adam_(
    state: TrainState, grads: dict[str, Tensor], instead: dict[str, Tensor] | None = None
) -> None:
    """Take one step of AdamW on the weights that have a gradient here, in place.

    Args:
        state: its weights and running statistics.
        grads: by name of the weight.
        instead: tensors to change in place of weights.
    """
    train = state.train
    schedule, last = state.schedule, state.step - 1
    threshold = [n for n in grads if n == "threshold"]
    matrices = [n for n in grads if n in MATRICES]
    others = [n for n in grads if n not in (*matrices, *threshold)]
    lr, decay = schedule.lr(last), train.weight_decay
    groups = [(matrices, lr, decay), (others, lr, 0.0)]
    if threshold:
        groups.append((threshold, schedule.threshold_lr(last), 0.0))
    for names, rate, decayed in groups:
        adamw(
            [(instead or {}).get(n, state.weights[n]) for n in names],
            [grads[n] for n in names],
            [state.adam[n][0] for n in names],
            [state.adam[n][1] for n in names],
            [],
            [torch.full((), state.step - 1.0, device=state.device) for _ in names],
            fused=True,
            amsgrad=False,
            beta1=train.betas[0],
            beta2=train.betas[1],
            lr=rate,
            weight_decay=decayed,
            eps=train.eps,
            maximize=False,
        )


def renormalise(w_dec: Tensor) -> None:
    """Give the rows norm 1; zero rows stay zero."""
    length = w_dec.norm(dim=1, keepdim=True)
    w_dec.div_(torch.where(length > 0, length, 1.0))
