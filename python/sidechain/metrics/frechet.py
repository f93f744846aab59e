# SPDX-License-Identifier: Apache-2.0
"""Frechet distance between sets of embeddings (FAD when they come from an audio network)."""

from __future__ import annotations

import torch
from torch import Tensor


def frechet_distance(samples: Tensor, reference: Tensor, *, components: int | None = None) -> float:
    """Squared Frechet distance of the Gaussians fitted to two sets of embeddings.

    d = |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2), with means m and unbiased covariances S

    The last trace is the nuclear norm of A1 A2^T for any A with A^T A = S, so no matrix root is
    taken and sets smaller than the embedding are exact too. Finite sets bias d upwards: compare
    sets of equal size only.

    Args:
        samples: embeddings [N, D] of what is judged, N >= 2, any float dtype.
        reference: embeddings [M, D] of what it should be like, M >= 2.
        components: project both onto this many leading principal components of `reference`
            first, 1 <= components <= min(M - 1, D); None keeps all D dimensions.

    Returns:
        Distance >= 0, computed in float64. Symmetric unless `components` is given.

    Raises:
        TypeError: embeddings that are not floating point.
        ValueError: wrong shapes, values that are not finite, components out of range.
    Source: Dowson & Landau 1982 (the formula); Kilgour et al. 2019, arXiv:1812.08466 (for audio).
    """
    _check(samples, reference)
    first, second = samples.double(), reference.to(samples.device).double()
    if components is not None:
        most = min(second.shape[0] - 1, second.shape[1])
        if not 1 <= components <= most:
            raise ValueError(
                f"frechet_distance: expected 1 <= components <= {most} [min(M - 1, D)], "
                f"got {components}"
            )
        axes = torch.linalg.svd(second - second.mean(dim=0), full_matrices=False).Vh[:components].T
        first, second = first @ axes, second @ axes
    root1, root2 = _root(first), _root(second)
    shift = (first.mean(dim=0) - second.mean(dim=0)).square().sum()
    overlap = torch.linalg.svdvals(root1 @ root2.T).sum()
    distance = shift + root1.square().sum() + root2.square().sum() - 2 * overlap
    return max(0.0, distance.item())  # equal sets: rounding may fall below zero


def _root(rows: Tensor) -> Tensor:
    """A [min(N, D), D] with A^T A the unbiased covariance of rows [N, D]."""
    centred = (rows - rows.mean(dim=0)) / (rows.shape[0] - 1) ** 0.5
    return torch.linalg.qr(centred, mode="r").R if rows.shape[0] > rows.shape[1] else centred


def _check(samples: Tensor, reference: Tensor) -> None:
    for name, rows in (("samples", samples), ("reference", reference)):
        if not rows.is_floating_point():
            raise TypeError(f"frechet_distance: expected floating-point {name}, got {rows.dtype}")
        if rows.ndim != 2 or rows.shape[0] < 2 or rows.shape[1] < 1:
            raise ValueError(
                f"frechet_distance: expected {name} [N, D] with N >= 2, got {list(rows.shape)}"
            )
        if not bool(rows.isfinite().all()):
            raise ValueError(f"frechet_distance: expected finite {name}, got NaN or infinity")
    if samples.shape[1] != reference.shape[1]:
        raise ValueError(
            f"frechet_distance: expected reference with D={samples.shape[1]} "
            f"[samples.shape[1]], got {reference.shape[1]}"
        )
