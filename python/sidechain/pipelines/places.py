# SPDX-License-Identifier: Apache-2.0
"""Places beside attention: the outputs of blocks, MLPs, resnets and single layers.

Forms of an output: [R, T, C]; [R, C, h, w], whose pixels are the tokens; a tuple, of which the
family says what element holds the latents.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from .attention import HOLDS

PLACE_KINDS = ("block", "mlp", "resnet")


@dataclass(frozen=True)
class Place:
    """What is known of a module whose output can be tapped.

    Attributes:
        kind: "block" | "mlp" | "resnet" | "module", which is any other layer.
        width: C of its output.
        element: number of the element that holds the latents, where it puts out a tuple; None = it
            puts out one tensor.
        goes: where the output goes, see `Attention.goes`; empty = not known.
        nick: a second alias, such as "resnet:mid".
        note: what else a user has to know, in a few words.
    """

    kind: str
    width: int
    element: int | None = None
    goes: str = ""
    nick: str = ""
    note: str = ""


Places = Callable[[str, nn.Module, nn.Module], Place | str | None]


def no_places(name: str, module: nn.Module, denoiser: nn.Module) -> Place | str | None:
    """Say that a family knows no places beside attention: the default of `Adapter.places`."""
    return None


def block_places(
    blocks: str, *, mlp: str, goes: str, element: int | None = None, other: tuple[str, ...] = ()
) -> Places:
    """Make an `Adapter.places` for a list of transformer blocks.

    Args:
        blocks: name of the list; the module path of a block ends with it and a number.
        mlp: name of the MLP within a block. Its width is that of the block.
        goes: where the output of the MLP goes, see `Attention.goes`.
        element: number of the element for the latents in what a block puts out; None = one tensor.
        other: names within a block that work on the tokens of the context: no places.
    """
    path = re.compile(rf"(?:.*\.)?{blocks}\.\d+(?:\.(.+))?")

    def places(name: str, module: nn.Module, denoiser: nn.Module) -> Place | str | None:
        found = path.fullmatch(name)
        if found is None:
            return None
        inner = found[1]
        if inner in other:
            return "it works on the tokens of the context"
        if inner not in (None, mlp):
            return None
        width = output_width(module if inner else module.get_submodule(mlp))
        if width is None:
            return f"the width of a {type(module).__name__} is not known"
        if inner:
            return Place("mlp", width, goes=goes)
        return Place("block", width, element, goes=HOLDS)

    return places


# Where the output layer of an MLP stands in the classes of diffusers.
_LAST = ("net", "ff", "down_proj", "proj_out", "conv_point", "linear_2")


def output_width(module: nn.Module) -> int | None:
    """Return C of what a layer or an MLP puts out, None where its parts do not say."""
    base: Any = getattr(module, "base_layer", module)  # of an adapter
    for name in ("out_features", "out_channels"):
        width = getattr(base, name, None)
        if isinstance(width, int):
            return width
    if isinstance(base, nn.LayerNorm):
        return int(base.normalized_shape[-1])
    if isinstance(base, nn.Sequential | nn.ModuleList):
        widths = [w for w in map(output_width, base) if w is not None]
        return widths[-1] if widths else None
    for name in _LAST:
        if isinstance(getattr(base, name, None), nn.Module):
            return output_width(getattr(base, name))
    return None


def read_module(module: nn.Module) -> Place | str:
    """Read the place that a single layer is; a text says why it is none."""
    base = getattr(module, "base_layer", module)
    if isinstance(base, nn.Linear | nn.LayerNorm | nn.Conv2d):
        width = output_width(base)
        if width is not None:
            return Place("module", width)
    return (
        f"its family does not say what a {type(module).__name__} puts out; linear layers, layer "
        "norms and two-dimensional convolutions are read from the module"
    )
