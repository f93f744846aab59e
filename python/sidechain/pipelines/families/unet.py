# SPDX-License-Identifier: Apache-2.0
"""Token arithmetic of U-Nets: what the families with a U-Net share."""

from __future__ import annotations

from ..adapter import CallShape
from ..sites import Site


def unet_tokens(site: Site, shape: CallShape) -> int:
    """Return the tokens of a site in a two-dimensional U-Net.

    `down_blocks.i` works at level i, `mid_block` at the last one and `up_blocks.i` at level
    n - 1 - i of n; every level halves height and width and rounds up.
    """
    last = len(site.config["block_out_channels"]) - 1
    part, _, rest = site.name.partition(".")
    level = last
    if part != "mid_block":
        block = int(rest.partition(".")[0])
        level = block if part == "down_blocks" else last - block
    height, width = shape.latent[-2:]
    for _ in range(level):
        height, width = (height + 1) // 2, (width + 1) // 2
    return height * width
