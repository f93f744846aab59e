# SPDX-License-Identifier: Apache-2.0
"""Distance between outputs in the feature maps of a network (LPAPS-like)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

EPSILON = 1e-10  # keeps the direction of an all-zero feature vector defined


def feature_distance(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """Perceptual distance from feature maps of several stages.

    d[b] = sum over stages i of sqrt(mean over positions p of sum over channels c of
    (a_i[b, c, p] / |a_i[b, :, p]| - b_i[b, c, p] / |b_i[b, :, p]|)^2)

    Args:
        first: one feature map per stage, [B, C_i, ...], any float dtype.
        second: as `first`; batch B, or 1 for one reference of all rows.

    Returns:
        Distances [B], float32 (float64 for float64 maps), 0 for equal maps, at most 2 per stage.

    Raises:
        ValueError: numbers or shapes of stages differ.
    Source: unweighted LPIPS (Zhang et al. 2018, arXiv:1801.03924) on stages of an audio network, as
        LPAPS does with CLAP stages (Iashin & Rahtu 2021; Paissan et al. 2023).
    """
    if not first or len(first) != len(second):
        raise ValueError(
            "feature_distance: expected the same number of stages (at least one), "
            f"got {len(first)} and {len(second)}"
        )
    return torch.stack(
        [_stage(a, b, stage) for stage, (a, b) in enumerate(zip(first, second, strict=True))]
    ).sum(dim=0)


def _stage(a: Tensor, b: Tensor, stage: int) -> Tensor:
    if a.ndim < 2 or a.shape[1:] != b.shape[1:] or b.shape[0] not in (1, a.shape[0]):
        raise ValueError(
            f"feature_distance: expected maps [B, C, ...] and [B|1, C, ...] at stage {stage}, "
            f"got {list(a.shape)} and {list(b.shape)}"
        )
    squares = (_unit(a) - _unit(b)).square().sum(dim=1)
    return squares.reshape(a.shape[0], -1).mean(dim=1).sqrt()


def _unit(maps: Tensor) -> Tensor:
    wide = maps if maps.dtype == torch.float64 else maps.float()
    return wide / wide.norm(dim=1, keepdim=True).clamp_min(EPSILON)
