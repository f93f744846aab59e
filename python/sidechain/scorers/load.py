# SPDX-License-Identifier: Apache-2.0
"""Make scorers and distances from what the command line names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import PurePath

from .._errors import InputError
from ..io.same import fingerprint
from .clap import ClapScorer
from .clip import ClipScorer
from .distance import FeatureDistance, LpipsDistance, SpectralDistance
from .function import FunctionScorer, function_digest, load_function
from .loading import files_digest, load_towers
from .protocol import Distance, Scorer
from .zoo import ZooScorer

TOWERS: dict[str, Callable[..., Scorer]] = {"clap": ClapScorer, "clip": ClipScorer}


def load_scorers(entries: Sequence[str], device: str = "cpu") -> dict[str, Scorer]:
    """Load scorers by name.

    Args:
        entries: "zoo", "clap:PATH", "clip:PATH" (folder or hub id) or "module:function".
        device: of their networks.

    Returns:
        Scorers by name: latent and mel of the zoo; clap, clip, or with the last part of their path
        where there are several of a kind; the function's own name.

    Raises:
        InputError: one that cannot be loaded, or two of one name.
    """
    kinds = Counter(entry.partition(":")[0] for entry in entries)
    found: list[Scorer] = []
    for entry in entries:
        kind, _, path = entry.partition(":")
        if entry == "zoo":
            from .. import zoo

            found += [ZooScorer(name, one) for name, one in zoo.scorers(device).items()]
        elif kind in TOWERS:
            name = kind if kinds[kind] == 1 else f"{kind}-{PurePath(path).name}"
            found.append(TOWERS[kind](name, *load_towers(kind, path, device)))
        else:
            found.append(FunctionScorer(path, load_function(entry)))
    names = Counter(scorer.name for scorer in found)
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise InputError(f"--scorer: expected scorers of different names, got {twice[0]} twice")
    return {scorer.name: scorer for scorer in found}


def load_distance(entry: str, device: str = "cpu") -> Distance:
    """Load a distance: "spectral", "lpips", or the features of "clap:PATH" or "clip:PATH".

    Raises:
        InputError: one that cannot be loaded.
    """
    if entry == "spectral":
        return SpectralDistance()
    if entry == "lpips":
        return LpipsDistance(device)
    (scorer,) = load_scorers([entry], device).values()
    return FeatureDistance(scorer)


def scorers_digest(entries: Sequence[str]) -> str:
    """Return a digest of what scorers are made of: a path does not say what is in it."""
    made = []
    for entry in entries:
        kind, _, path = entry.partition(":")
        if entry in ("zoo", "spectral", "lpips"):
            made.append(entry)
        else:
            made.append(files_digest(path) if kind in TOWERS else function_digest(entry))
    return fingerprint(scorers=made)
