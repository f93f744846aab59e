# SPDX-License-Identifier: Apache-2.0
"""Arguments of the ops that tap a site: what to capture, and how to steer.

Their fields stand in the order of the op schemas, so that an op is called with
`(x, *steering, *capture)` and nothing is looked up by name on the way.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class Capture(NamedTuple):
    """Buffers that an op adds to or copies to; None where one is not wanted.

    With s = `slot` and over the tokens t of row r where `mask` holds: sums[s, r] += sum_t x[r, t];
    squares[s, r] += sum_t x[r, t]^2; counts[s, r] += number of tokens; ring[s, r, t] = x[r, t].

    Attributes:
        sums: [S, R, C] float32, last dim contiguous. Accumulated into.
        squares: [S, R, C] float32, last dim contiguous. Accumulated into.
        counts: [S, R] float32. Accumulated into.
        ring: [S, R, T, C] float32 | float16 | bfloat16, last dim contiguous. Masked tokens keep
            what was there.
        slot: S index to write, [1] int64; outside a buffer nothing is captured. None = 0.
        mask: tokens to capture, [R | 1, T] bool. None = all.
    """

    sums: Tensor | None = None
    squares: Tensor | None = None
    counts: Tensor | None = None
    ring: Tensor | None = None
    slot: Tensor | None = None
    mask: Tensor | None = None


class Steering(NamedTuple):
    """Directions that `tap_` adds to the activations.

    With v = vectors[index[r], slot], a = strength[r], b = removal[r]:
    y = x + (a - b * max(0, <x, v>)) v, and with renorm y *= |x| / |y| (y = 0 stays 0), written to
    the tokens where `mask` holds. A row with a = 0 and b = 0, or whose index or slot lies outside
    the table, is not written: it stays bit-identical.

    Attributes:
        vectors: steering table [V, S, C] float32, last dim contiguous.
        slot: S index, [1] int64. None = 0.
        index: V index of each row, [R] int32, -1 for none. None = 0.
        strength: a [R] float32. None = 0.
        removal: b [R] float32. None = 0; without it and renorm no dot products are computed.
        mask: tokens to steer, [R | 1, T] bool. None = all.
        renorm: give every steered token the norm it had.
    """

    vectors: Tensor
    slot: Tensor | None = None
    index: Tensor | None = None  # type: ignore[assignment]  # tuple.index is never asked for
    strength: Tensor | None = None
    removal: Tensor | None = None
    mask: Tensor | None = None
    renorm: bool = False


#: Stand for a struct that is not given, in a call of an op.
NO_CAPTURE = Capture()
NO_STEERING: tuple[Any, ...] = (*(None,) * 6, False)
