# SPDX-License-Identifier: Apache-2.0
"""Tokens and places of U-Nets: what the families with a U-Net share."""

from __future__ import annotations

import re

from torch import nn

from ..adapter import CallShape
from ..attention import ADDED, HOLDS
from ..places import Place, block_places, output_width
from ..sites import Site

_RESNET = re.compile(r"(?:down_blocks\.\d+|mid_block|up_blocks\.\d+)\.resnets\.\d+")
_transformers = block_places("transformer_blocks", mlp="ff", goes=ADDED)


def unet_places(name: str, module: nn.Module, denoiser: nn.Module) -> Place | str | None:
    """Find transformer blocks, their MLPs and resnets, whose pixels are the tokens.

    The last resnet of the middle block, which puts out what the block does, is "resnet:mid": the
    h-space of Kwon et al., Diffusion models already have a semantic latent space (ICLR 2023).
    """
    if not _RESNET.fullmatch(name):
        return _transformers(name, module, denoiser)
    width = output_width(module)
    if width is None:
        return f"the width of a {type(module).__name__} is not known"
    middle = f"mid_block.resnets.{len(getattr(denoiser.mid_block, 'resnets', ())) - 1}"
    nick = "resnet:mid" if name == middle else ""
    return Place("resnet", width, goes=HOLDS, nick=nick)


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
