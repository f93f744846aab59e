# SPDX-License-Identifier: Apache-2.0
"""The forms in which modules put out [R, T, C], and the check that T is what it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..pipelines import Generation, Site

if TYPE_CHECKING:
    from .operations import Operation


class Expected(NamedTuple):
    """Output of a site in the generation that a tap was prepared for."""

    site: str
    tokens: int
    width: int
    rows: int = 0  # of the denoiser call; 0 = not known


def expect(operations: Iterable[Operation], site: Site, generation: Generation) -> None:
    """Tell the operations at a site what output they will meet in a generation."""
    expected = Expected(site.name, generation.tokens(site), site.width, generation.shape.rows)
    for operation in operations:
        operation.expected = expected


def edit_output(
    out: Any, edits: list[Callable[[Tensor], Tensor]], operations: list[Operation]
) -> Any:
    """Run edits on what a module put out.

    Args:
        out: [R, T, C]; a tuple whose first element is that of the latents, as joint attention has
            it; or [R, C, h, w].
        edits: take and return [R, T, C], in place where no gradient is wanted.
        operations: of the site, which know what its output must be.

    Returns:
        The same form, edited.
    """
    if isinstance(out, tuple):
        return (edit_output(out[0], edits, operations), *out[1:])
    if out.dim() == 4:
        return _edit_map(out, edits, operations)
    _check(out, operations)
    if out.stride(2) != 1:  # tokens of a map that was only transposed
        return _as_laid_out(out, _edit(out.contiguous(), edits))
    return _edit(out, edits)


def _edit(out: Tensor, edits: list[Callable[[Tensor], Tensor]]) -> Tensor:
    for edit in edits:
        out = edit(out)
    return out


def _edit_map(
    out: Tensor, edits: list[Callable[[Tensor], Tensor]], operations: list[Operation]
) -> Tensor:
    tokens = out.flatten(2).transpose(1, 2).contiguous()
    edited: Tensor = edit_output(tokens, edits, operations)
    return _as_laid_out(out, edited.transpose(1, 2).unflatten(2, out.shape[2:]))


def _as_laid_out(out: Tensor, edited: Tensor) -> Tensor:
    if torch.is_grad_enabled() and edited.requires_grad:
        return edited.contiguous()
    # With the strides of the output, so that what follows computes as it did.
    return torch.empty_like(out).copy_(edited)


def _check(out: Tensor, operations: list[Operation]) -> None:
    for operation in operations:
        expected = operation.expected
        if expected is None:
            continue
        if out.shape[1] != expected.tokens or out.shape[2] != expected.width:
            raise RuntimeError(
                f"taps: expected an output of [rows, {expected.tokens}, {expected.width}] at "
                f"{expected.site} [what its family says of this generation], got {list(out.shape)}"
            )
