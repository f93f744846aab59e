# SPDX-License-Identifier: Apache-2.0
"""What kind of site an attention module is, read from the module itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Attention:
    """What is known of an attention module that can be tapped.

    Attributes:
        kind: "cross" reads a context, "self" does not, "joint" runs over both at once and puts out
            both; its site is the output for the latents.
        width: C of its output.
        context_width: C of what keys and values are computed from.
        heads: H.
        source: number of the context that it reads, None for self-attention.
        note: what else a user has to know, in a few words.
    """

    kind: str
    width: int
    context_width: int
    heads: int
    source: int | None = None
    note: str = ""


def read_attention(
    module: nn.Module, kind: str, source: int | None = None, note: str = ""
) -> Attention:
    """Read widths and heads of an attention module of a known kind.

    Args:
        module: attention module of diffusers, whatever its class.
        kind: "cross" | "self" | "joint".
        source: number of the context; None = 0 for kinds that read one.
        note: see `Attention`.
    """
    attn: Any = module
    reads = kind != "self"
    width = getattr(attn, "out_dim", None)
    if width is None:
        out = attn.to_out
        width = (out if hasattr(out, "out_features") else out[0]).out_features
    return Attention(
        kind=kind,
        width=int(width),
        context_width=int(_context_width(attn, kind)),
        heads=int(attn.heads),
        source=(source or 0) if reads else None,
        note=note,
    )


def _context_width(attn: Any, kind: str) -> Any:
    names = ("add_k_proj",) if kind == "joint" else ("to_k", "to_kv", "to_qkv")
    for name in names:
        projection = getattr(attn, name, None)
        if projection is not None:
            return projection.in_features
    raise TypeError(f"sites: expected {' or '.join(names)} in {type(attn).__name__}, got none")


def describe_attention(name: str, module: nn.Module, denoiser: nn.Module) -> Attention | str:
    """Describe a module that says itself whether it reads a context, as most of them do."""
    cross = getattr(module, "is_cross_attention", None)
    if cross is None:
        return "the module does not say whether it reads a context"
    return read_attention(module, "cross" if cross else "self")


def with_context(*names: str) -> Callable[[str, nn.Module, nn.Module], Attention | str]:
    """Make an `Adapter.describe` for modules of known names, the last part of their paths.

    Args:
        *names: of modules that read the context; the others are self-attention.
    """

    def describe(name: str, module: nn.Module, denoiser: nn.Module) -> Attention | str:
        cross = name.rpartition(".")[2] in names
        return read_attention(module, "cross" if cross else "self")

    return describe
