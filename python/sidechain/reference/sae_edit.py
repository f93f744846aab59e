# SPDX-License-Identifier: Apache-2.0
"""Reference of ``sae_edit_``: move activations along the decoder rows of edited features."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .codes import accumulator, add_scaled_rows, entries

if TYPE_CHECKING:
    # A type of arguments: `ops` stands above.
    from ..ops.sae_structs import CodeEdit


def sae_edit(
    x: Tensor,
    edit: CodeEdit,
    w_dec: Tensor,
    strength: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Return the edited x; the contract is that of `sidechain.ops.sae_edit_`.

    Differentiable in: x, values_old, values_new, w_dec, strength.
    """
    y, _ = _moved(x, edit, w_dec, strength)
    return y if mask is None else torch.where(mask[:, None], y, x)


def _moved(
    x: Tensor, edit: CodeEdit, w_dec: Tensor, strength: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the edited x, and for each row whether it has a change that is not 0."""
    acc, rows = accumulator(x), x.shape[0]
    moved = torch.zeros(rows, dtype=torch.int64, device=x.device)
    if rows == 0 or w_dec.shape[0] == 0:
        return x, moved > 0
    change = _change(edit.values_old, edit.values_new)
    e = entries(change, edit.indices, edit.offsets, w_dec.shape[0])
    delta, differs = e.value, e.value != 0
    if strength is not None:
        by = strength.expand(rows).index_select(0, e.row)
        delta, differs = delta * by, differs & (by != 0)
    total = torch.zeros(x.shape, dtype=acc, device=x.device)
    total = add_scaled_rows(total, e.row, delta, e.valid, w_dec, e.feature)
    return (x.to(acc) + total).to(x.dtype), moved.index_add(0, e.row, differs.long()) > 0


def _change(old: Tensor | None, new: Tensor | None) -> Tensor:
    if old is None:
        if new is None:
            raise ValueError("sae_edit: expected values_old or values_new, got neither")
        return new
    return -old if new is None else new - old


def sae_edit_(
    x: Tensor, edit: CodeEdit, w_dec: Tensor, strength: Tensor | None, mask: Tensor | None
) -> None:
    """Do the same as `sae_edit` in place; rows without a change keep every bit."""
    y, written = _moved(x, edit, w_dec, strength)
    if mask is not None:
        written = written & mask
    x.copy_(torch.where(written[:, None], y, x))
