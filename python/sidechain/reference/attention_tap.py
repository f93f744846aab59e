# SPDX-License-Identifier: Apache-2.0
"""Reference of ``attention_tap``: attention over a bank of contexts, with its output captured.

Nothing here reads a value back to the host, so the same code traces under ``torch.compile``.
Source: scaled dot-product attention (Vaswani et al. 2017, eq. 1), one context picked per row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .tap import capture_, captured
from .tap_structs import Capture


def attend(
    q: Tensor,
    k_bank: Tensor,
    v_bank: Tensor,
    context_index: Tensor | None = None,
    context_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Return softmax(scale q k^T) v per head, over the context that each row picks.

    Args:
        q: queries [R, T, H, D], any float dtype.
        k_bank: keys of every context [M, S, Hkv, D]; query head h reads head h // (H / Hkv).
        v_bank: values [M, S, Hkv, D].
        context_index: context of each row [R] int32; outside [0, M) the output is zero. None = 0.
        context_mask: tokens of each context that may be read [M, S] bool; a context without any
            gives zero. None = all.
        scale: factor of the scores; None = 1 / sqrt(D).

    Returns:
        [R, T, H, D] contiguous, dtype of q.

    Differentiable in: q, k_bank, v_bank.
    """
    rows, contexts = q.shape[0], k_bank.shape[0]
    if context_index is None:
        context_index = torch.zeros(rows, dtype=torch.int32, device=q.device)
    live = (context_index >= 0) & (context_index < contexts)  # [R]
    chosen = context_index.clamp(0, contexts - 1)
    allowed = None
    if context_mask is not None:
        readable = context_mask.any(-1, keepdim=True)  # [M, 1]
        # What is masked is not read: a NaN there must not meet a probability of zero.
        k_bank = torch.where(context_mask[..., None, None], k_bank, 0.0)
        v_bank = torch.where(context_mask[..., None, None], v_bank, 0.0)
        allowed = (context_mask | ~readable).index_select(0, chosen)[:, None, None]  # [R, 1, 1, S]
        live = live & readable[:, 0].index_select(0, chosen)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k_bank.index_select(0, chosen).transpose(1, 2),
        v_bank.index_select(0, chosen).transpose(1, 2),
        attn_mask=allowed,
        scale=scale,
        enable_gqa=q.shape[2] != k_bank.shape[2],
    ).transpose(1, 2)
    return torch.where(live[:, None, None, None], out, 0.0).contiguous()


def attention_tap(
    q: Tensor,
    k_bank: Tensor,
    v_bank: Tensor,
    *,
    context_index: Tensor | None = None,
    context_mask: Tensor | None = None,
    scale: float | None = None,
    capture: Capture | None = None,
) -> tuple[Tensor, Capture]:
    """Return the output of `attend` and the updated capture buffers; no argument is written.

    The buffers are those of `sidechain.reference.tap.tap` with C = H D, fed with the output.
    """
    out = attend(q, k_bank, v_bank, context_index, context_mask, scale)
    return out, captured(out.flatten(2), capture or Capture())


def attention_tap_(
    out: Tensor,
    q: Tensor,
    k_bank: Tensor,
    v_bank: Tensor,
    context_index: Tensor | None,
    context_mask: Tensor | None,
    scale: float | None,
    capture: Capture,
) -> None:
    """Do the same as `attention_tap`, writing `out` and the capture buffers in place."""
    out.copy_(attend(q, k_bank, v_bank, context_index, context_mask, scale))
    capture_(out.flatten(2), capture)
