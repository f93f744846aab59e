# SPDX-License-Identifier: Apache-2.0
"""Presets of a localization: the sets of sites that get the clean prompt, one for each row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...metrics.impact import windows
from ..common import slug


@dataclass(frozen=True)
class Preset:
    """A set of sites to patch together; `name` is "none", "all", a site, a window or "top:k"."""

    name: str
    sites: tuple[str, ...]


def clip_name(concept: str, preset: str) -> str:
    """Path in the run folder of the clip of the first prompt pair and seed."""
    return f"audio/{slug(concept)}_{preset.replace(':', '-')}.flac"


def window_name(sites: Sequence[str]) -> str:
    """Name consecutive sites: "cross:2-4" of ("cross:2", "cross:3", "cross:4")."""
    if len(sites) == 1:
        return sites[0]
    kind, first = sites[0].split(":")
    return f"{kind}:{first}-{sites[-1].split(':')[1]}"


def single_presets(sites: Sequence[str]) -> list[Preset]:
    """List the presets "none", "all" and each single site."""
    every = tuple(sites)
    return [Preset("none", ()), Preset("all", every), *(Preset(s, (s,)) for s in sites)]


def window_presets(sites: Sequence[str], size: int) -> list[Preset]:
    """List every window of `size` consecutive sites; none for size 1."""
    if size == 1:
        return []
    return [Preset(window_name(window), window) for window in windows(sites, size)]


def top_presets(order: Sequence[str]) -> list[Preset]:
    """List the best k sites together, k = 1 .. L - 1 (k = 0 is none, k = L is all)."""
    return [Preset(f"top:{k}", tuple(order[:k])) for k in range(1, len(order))]


def row_masks(presets: Sequence[Preset], sites: Sequence[str]) -> dict[str, Tensor]:
    """Return, for every site, the mask [B] of the rows that are patched there, bool."""
    return {site: torch.tensor([site in preset.sites for preset in presets]) for site in sites}
