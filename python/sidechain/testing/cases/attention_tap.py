# SPDX-License-Identifier: Apache-2.0
"""Cases of `attention_tap`: cross-attention of audio models, and irregular shapes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ._capture import capture_arguments

SLOTS = 3


@dataclass(frozen=True)
class AttentionCase:
    """One call of `attention_tap`; every flag adds the argument of that name."""

    rows: int
    tokens: int
    context: int
    heads: int
    width: int
    kv_heads: int | None = None  # None = heads
    contexts: int = 3
    context_index: bool = True  # the first of several rows gets -1
    context_mask: bool = False
    scale: float | None = None
    packed: bool = True  # q and the banks are views of [.., H D]; else transposed [.., H, T, D]
    sums: bool = False
    squares: bool = False
    counts: bool = False
    ring: torch.dtype | None = None
    capture_mask: int | None = None  # rows of the mask: 1 or R
    what: str = "plain"

    @property
    def name(self) -> str:
        """Readable id: what-R-T-S-H-D."""
        sizes = (f"R{self.rows}", f"T{self.tokens}", f"S{self.context}")
        return "-".join((self.what, *sizes, f"H{self.heads}", f"D{self.width}"))

    def make(self, dtype: torch.dtype, seed: int = 0, device: str = "cpu") -> dict[str, Any]:
        """Random arguments of `attention_tap`. Buffers start with a known content."""
        g = torch.Generator().manual_seed(seed)

        def heads_last(*sizes: int) -> Tensor:
            """Random [n, T, H, D] in the layout of the case."""
            n, length, heads, width = sizes
            if self.packed:
                return torch.randn(*sizes, generator=g).to(dtype)
            return torch.randn(n, heads, length, width, generator=g).to(dtype).transpose(1, 2)

        rows, tokens, width = self.rows, self.tokens, self.width
        kv_heads = self.kv_heads or self.heads
        args: dict[str, Any] = {
            # Scores of a few units, as in trained attention, rather than a uniform average.
            "q": 2.0 * heads_last(rows, tokens, self.heads, width),
            "k_bank": heads_last(self.contexts, self.context, kv_heads, width),
            "v_bank": heads_last(self.contexts, self.context, kv_heads, width) + 0.25,
        }
        if self.context_index:
            first = -1 if rows > 2 else 0
            index = (torch.arange(rows, dtype=torch.int32) + first) % self.contexts
            index[: 1 if rows > 2 else 0] = -1
            args["context_index"] = index
        if self.context_mask:
            mask = torch.rand(self.contexts, self.context, generator=g) < 0.6
            mask[:, 0] = True
            args["context_mask"] = mask
        if self.scale is not None:
            args["scale"] = self.scale
        args |= capture_arguments(self, SLOTS, self.heads * width, g)
        return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in args.items()}


_moments: dict[str, Any] = {"sums": True, "squares": True, "counts": True}
_plain = AttentionCase(4, 65, 24, 5, 32)
_moment = replace(_plain, what="moments", **_moments)

ATTENTION_CASES = (
    _plain,
    replace(_plain, what="no-index", context_index=False, contexts=1),
    replace(_plain, what="sums", sums=True),
    _moment,
    replace(_moment, what="transposed", packed=False, rows=2, heads=3, width=40),
    replace(_moment, what="gqa", heads=6, kv_heads=2, width=64, context=130, tokens=70),
    replace(_moment, what="one-kv-head", heads=4, kv_heads=1, width=16, context_mask=True),
    replace(
        _moment,
        what="everything",
        rows=3,
        tokens=130,
        context=77,
        heads=4,
        kv_heads=2,
        width=80,
        scale=0.1,
        context_mask=True,
        capture_mask=3,
        ring=torch.float16,
    ),
    replace(_plain, what="ring", ring=torch.bfloat16, capture_mask=1, width=96),
    replace(_plain, what="wide", rows=2, tokens=19, context=513, heads=2, width=128),
    replace(_moment, what="shared-mask", rows=5, tokens=1, context=1, width=8, capture_mask=1),
    replace(_moment, what="odd", rows=2, tokens=111, context=53, heads=1, width=1),
    replace(_moment, what="long", rows=2, tokens=500, context=20, heads=2, width=7),
    replace(_moment, what="no-rows", rows=0, tokens=5, heads=2),
    replace(_plain, what="no-tokens", rows=2, tokens=0, heads=2, ring=torch.float32, **_moments),
    replace(_moment, what="one-row", rows=1, tokens=4, heads=2, width=64),
    replace(_moment, what="dit", rows=2, tokens=1025, context=130, heads=2, kv_heads=1, width=64),
)

# Sites that are timed: the zoo's music model with the rows of a sweep, Stable Audio, ACE-Step 1.5,
# a U-Net level of AudioLDM2, ACE-Step v1.
_bench = replace(_plain, what="pooled", contexts=4, sums=True, counts=True)
ATTENTION_BENCH = (
    replace(_bench, rows=16),
    replace(_bench, rows=128),
    replace(_bench, rows=2, tokens=1025, context=130, heads=24, kv_heads=12, width=64),
    replace(_bench, rows=2, tokens=750, context=512, heads=16, kv_heads=8, width=128),
    replace(_bench, rows=2, tokens=256, context=128, heads=8, width=80),
    replace(_bench, rows=2, tokens=323, context=256, heads=20, width=128),
)
