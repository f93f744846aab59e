# SPDX-License-Identifier: Apache-2.0
"""Token arithmetic of transformers over patches: what their families share."""

from __future__ import annotations

from ..adapter import CallShape
from ..sites import Site


def patch_tokens(site: Site, shape: CallShape) -> int:
    """Return the tokens of a site: the patches of the latents [C, ..., h, w]."""
    size = site.config["patch_size"]
    places = shape.latent[1:]
    sizes = (size,) * len(places) if isinstance(size, int) else tuple(size)
    tokens = 1
    for length, step in zip(places, sizes, strict=True):
        tokens *= length // int(step)
    return tokens
