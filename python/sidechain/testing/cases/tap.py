# SPDX-License-Identifier: Apache-2.0
"""Cases of `tap_`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ._capture import capture_arguments

SLOTS = 4
TABLE = 3


@dataclass(frozen=True)
class TapCase:
    """One call of `tap_`; every flag adds the argument of that name."""

    rows: int
    tokens: int
    channels: int
    strength: bool = True
    removal: bool = False
    renorm: bool = False
    index: bool = False
    steer_mask: int | None = None  # rows of the mask: 1 or R
    sums: bool = False
    squares: bool = False
    counts: bool = False
    ring: torch.dtype | None = None
    capture_mask: int | None = None
    what: str = "steer"

    @property
    def name(self) -> str:
        """Readable id: what-R-T-C."""
        return f"{self.what}-R{self.rows}-T{self.tokens}-C{self.channels}"

    def make(self, dtype: torch.dtype, seed: int = 0, device: str = "cpu") -> dict[str, Any]:
        """Random arguments of `tap_`; x is among them. Buffers start with a known content."""
        g = torch.Generator().manual_seed(seed)
        rows, tokens, channels = self.rows, self.tokens, self.channels
        # A common offset per channel, as real activations have.
        x = torch.randn(rows, tokens, channels, generator=g)
        x += 0.5 * torch.randn(channels, generator=g)
        args: dict[str, Any] = {"x": x.to(dtype)}
        if self.strength or self.removal:
            v = torch.randn(TABLE, SLOTS, channels, generator=g)
            args["vectors"] = v / v.norm(dim=-1, keepdim=True).clamp(min=1e-9)
            args["steer_slot"] = torch.tensor([2])
        if self.strength:
            args["strength"] = torch.linspace(-3.0, 5.0, rows) if rows != 1 else torch.tensor([3.0])
        if self.removal:
            args["removal"] = torch.linspace(1.0, 0.0, rows)
        if self.index:
            args["index"] = (torch.arange(rows, dtype=torch.int32) % (TABLE + 1)) - 1
        if self.steer_mask:
            args["steer_mask"] = torch.rand(self.steer_mask, tokens, generator=g) < 0.7
        if self.renorm and "vectors" in args:
            args["renorm"] = True
        args |= capture_arguments(self, SLOTS, channels, g)
        return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in args.items()}


_moments: dict[str, Any] = {"sums": True, "squares": True, "counts": True}
_steer = TapCase(2, 77, 320)
_capture = TapCase(2, 77, 320, strength=False, what="moments", **_moments)

TAP_CASES = (
    _steer,
    replace(_steer, rows=3, tokens=19, channels=111, renorm=True, what="renorm"),
    replace(_steer, strength=False, removal=True, what="removal"),
    replace(
        _steer,
        rows=4,
        tokens=65,
        channels=160,
        removal=True,
        renorm=True,
        index=True,
        steer_mask=4,
        what="all-steering",
    ),
    replace(_steer, rows=5, tokens=1, channels=7, steer_mask=1, what="shared-mask"),
    _capture,
    replace(_capture, tokens=500, channels=1, what="one-channel"),
    replace(_capture, tokens=130, channels=64, capture_mask=1, what="masked-moments"),
    replace(_capture, squares=False, counts=False, tokens=33, what="sums-only"),
    replace(
        _capture,
        sums=False,
        squares=False,
        counts=False,
        ring=torch.bfloat16,
        capture_mask=2,
        what="ring",
    ),
    replace(
        _capture,
        rows=3,
        tokens=257,
        channels=640,
        strength=True,
        removal=True,
        renorm=True,
        index=True,
        steer_mask=3,
        capture_mask=3,
        ring=torch.float16,
        what="everything",
    ),
    replace(_capture, rows=1, tokens=1024, channels=2560, strength=True, what="wide"),
    replace(_capture, rows=2, tokens=1025, channels=1536, strength=True, renorm=True, what="dit"),
    TapCase(0, 5, 16, what="no-rows"),
    TapCase(2, 0, 16, sums=True, counts=True, ring=torch.float32, what="no-tokens"),
    TapCase(1, 4, 64, **_moments, what="one-row"),
)

# Shapes on both sides of the limits at which the CUDA kernel divides its work differently
# (csrc/cuda/tap_plan.cuh), each with its purpose.
_all = TapCase(
    2,
    13,
    72,
    removal=True,
    renorm=True,
    index=True,
    steer_mask=2,
    capture_mask=2,
    ring=torch.float16,
    **_moments,
)
_bare = replace(_all, removal=False, renorm=False)
_steer_only = replace(_all, ring=None, capture_mask=None, sums=False, squares=False, counts=False)
_capture_only = replace(
    _all, strength=False, removal=False, renorm=False, index=False, steer_mask=None
)
_one = replace(_all, rows=1, index=False, steer_mask=1, capture_mask=1)
TAP_LIMITS = (
    # One kernel for each kind of work, lanes without channels, a group that is not full.
    replace(_all, what="idle-lanes"),
    replace(_bare, what="add+capture"),
    replace(_steer_only, what="steer+renorm"),
    replace(_steer_only, removal=False, renorm=False, what="add"),
    replace(_steer_only, renorm=False, strength=False, what="removal-masked"),
    replace(_capture_only, what="capture"),
    replace(_capture_only, sums=False, squares=False, ring=None, what="counts"),
    # The longest row that one block holds, and one token more.
    replace(_all, tokens=128, channels=160, what="one-block"),
    replace(_all, tokens=129, channels=160, what="two-launches"),
    replace(_capture_only, rows=1, tokens=8, channels=2560, capture_mask=1, what="one-team"),
    # Blocks of several teams that leave partial sums; the last team of a row has no token, yet all
    # teams meet at the barriers.
    replace(_all, rows=9, tokens=132, channels=264, steer_mask=9, capture_mask=9, what="teams"),
    # As many tokens as a team can have, in many chunks.
    replace(_capture_only, rows=8, tokens=7501, channels=8, capture_mask=8, what="long"),
    # Channels that a block can hold (6144 in 2 bytes, 3072 in 4), and one pack more.
    replace(_one, tokens=9, channels=3072, what="held4"),
    replace(_one, tokens=5, channels=6144, what="held"),
    replace(_one, tokens=5, channels=6152, what="wide"),
    replace(_one, tokens=5, channels=3076, what="wide4"),
    replace(_one, tokens=9, channels=1030, what="no-packs"),
    # A ring without sums, in blocks of one team and of several; one as wide as x or wider.
    replace(_capture_only, tokens=70, sums=False, squares=False, what="ring-alone"),
    replace(_bare, tokens=37, ring=torch.float32, what="wide-ring"),
)  # fmt: skip

# Sites that are timed: Stable Audio's cross-attention with all rows of a sweep, the zoo's model,
# a U-Net level, one long capture.
_fused = TapCase(
    8,
    1025,
    1536,
    renorm=True,
    what="capture+steer+renorm",
    **_moments,
)
TAP_BENCH = (
    _fused,
    replace(_fused, renorm=False, what="capture+steer"),
    replace(_fused, renorm=False, sums=False, squares=False, counts=False, what="steer"),
    replace(_fused, strength=False, renorm=False, what="capture"),
    replace(_fused, removal=True, renorm=False, what="capture+removal"),
    replace(
        _fused,
        strength=False,
        renorm=False,
        sums=False,
        squares=False,
        counts=False,
        ring=torch.bfloat16,
        what="ring",
    ),
    replace(_fused, rows=16, tokens=65, channels=160),
    replace(_fused, rows=2, tokens=65, channels=160),
    replace(_fused, rows=2, tokens=256, channels=640),
)
