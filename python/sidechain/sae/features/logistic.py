# SPDX-License-Identifier: Apache-2.0
"""Logistic regression with many more features than examples."""

from __future__ import annotations

import torch
from torch import Tensor


def logistic_weights(
    x: Tensor, positive: int, *, cost: float = 1.0, iterations: int = 100
) -> Tensor:
    """Return the weights [F] of a logistic regression of the first rows against the others.

    Minimises |w|^2 / 2 + cost * sum_i log(1 + exp(-s_i (w z_i + b))) over w and b, where z are the
    columns of x scaled to mean 0 and variance 1 (constant columns to 0) and s = 1 for the first
    `positive` rows, -1 for the others. With w = z^T a it is a problem in M unknowns, solved by
    Newton steps, each a system of M + 1 equations.

    Args:
        x: [M, F] float64.
        positive: rows with the concept, 1 .. M - 1.
        cost: weight of the data against the penalty.
        iterations: largest number of Newton steps.

    Raises:
        ValueError: rows of one class only.
    """
    count = len(x)
    if not 0 < positive < count:
        raise ValueError(f"logistic_weights: expected rows of both classes, got {positive}/{count}")
    spread = x.std(0, unbiased=False)
    z = (x - x.mean(0)) / torch.where(spread > 0, spread, 1.0)
    kernel = z @ z.T
    target = (torch.arange(count, device=x.device) < positive).to(x.dtype)
    ones = x.new_ones(count, 1)
    # Stationary points have a = cost (target - p) and sum a = 0; the step linearises p.
    outputs, a = x.new_zeros(count), x.new_zeros(count)
    for _ in range(iterations):
        p = torch.sigmoid(outputs)
        curvature = (p * (1 - p)).clamp(min=1e-12)
        system = torch.cat([kernel + torch.diag(1 / (cost * curvature)), ones], 1)
        system = torch.cat([system, torch.cat([ones.T, x.new_zeros(1, 1)], 1)])
        right = torch.cat([outputs + (target - p) / curvature, x.new_zeros(1)])
        solved = torch.linalg.solve(system, right)
        step = solved[:-1] - a
        a = solved[:-1]
        outputs = kernel @ a + solved[-1]
        if float(step.abs().max()) <= 1e-10 * max(1.0, float(a.abs().max())):
            break
    return z.T @ a
