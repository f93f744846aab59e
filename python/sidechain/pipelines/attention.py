# SPDX-License-Identifier: Apache-2.0
"""What kind of site an attention module is, read from the module itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

ATTENTION_KINDS = ("cross", "self", "joint")

# Where an output goes: what `Attention.goes` and `Place.goes` say.
ADDED = "added to the residual"
GATED = "gated, then added to the residual"
HOLDS = "holds the residual"
UNKNOWN = "whether it holds the residual is not known"
PROJECTED = "before the block's proj_out"


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
        reads: what the context is, as a word: "text", "image", "second encoder"; empty for
            self-attention.
        goes: where the output goes; empty = not known.
    """

    kind: str
    width: int
    context_width: int
    heads: int
    source: int | None = None
    note: str = ""
    reads: str = ""
    goes: str = ""


def read_attention(
    module: nn.Module,
    kind: str,
    source: int | None = None,
    *,
    note: str = "",
    reads: str = "context",
    goes: str = "",
) -> Attention:
    """Read widths and heads of an attention module of a known kind.

    Args:
        module: attention module of diffusers, whatever its class.
        kind: "cross" | "self" | "joint".
        source: number of the context; None = 0 for kinds that read one.
        note: see `Attention`.
        reads: see `Attention`; self-attention reads nothing.
        goes: see `Attention`.
    """
    attn: Any = module
    reading = kind != "self"
    width = getattr(attn, "out_dim", None)
    if width is None:
        out = attn.to_out
        width = (out if hasattr(out, "out_features") else out[0]).out_features
    return Attention(
        kind=kind,
        width=int(width),
        context_width=int(_context_width(attn, kind)),
        heads=int(attn.heads),
        source=(source or 0) if reading else None,
        note=note,
        reads=reads if reading else "",
        goes=goes,
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


Describe = Callable[[str, nn.Module, nn.Module], Attention | str]


def described(reads: str, goes: str | Mapping[str, str]) -> Describe:
    """Make an `Adapter.describe` for modules that say themselves whether they read a context.

    Args:
        reads: what the context is, see `Attention.reads`.
        goes: where the outputs go, see `Attention.goes`: of all, or by kind.
    """

    def describe(name: str, module: nn.Module, denoiser: nn.Module) -> Attention | str:
        found = describe_attention(name, module, denoiser)
        return found if isinstance(found, str) else _told(found, reads, goes)

    return describe


def with_context(
    *names: str, reads: str = "context", goes: str | Mapping[str, str] = ""
) -> Describe:
    """Make an `Adapter.describe` for modules of known names, the last part of their paths.

    Args:
        *names: of modules that read the context; the others are self-attention.
        reads: what the context is, see `Attention.reads`.
        goes: where the outputs go, see `Attention.goes`: of all, or by kind.
    """

    def describe(name: str, module: nn.Module, denoiser: nn.Module) -> Attention | str:
        cross = name.rpartition(".")[2] in names
        return _told(read_attention(module, "cross" if cross else "self"), reads, goes)

    return describe


def _told(found: Attention, reads: str, goes: str | Mapping[str, str]) -> Attention:
    return replace(
        found,
        reads=reads if found.source is not None else "",
        goes=goes if isinstance(goes, str) else goes[found.kind],
    )
