# SPDX-License-Identifier: Apache-2.0
"""A shuffled order of n rows that is computed, not stored: O(1) memory, any position at once."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 8
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


class Permutation:
    """A bijection of [0, n) chosen by (seed, epoch).

    A Feistel network on the bits of the index, split into two halves: in turn each is xor-ed with
    a keyed hash of the other, so every round is a bijection of [0, 2^b), b = ceil(log2 n). An
    index that leaves [0, n) is sent through again until it is back inside ("cycle walking"), which
    makes it a bijection of [0, n); fewer than two passes on average.

    Args:
        size: n, at least 1.
        seed: any integer.
        epoch: any integer; another one gives another order.

    Raises:
        ValueError: size < 1.

    Source: Luby and Rackoff 1988 (the network); Black and Rogaway 2002, section 3 (cycle walking).
    The round keys and the round function are SplitMix64 (Steele, Lea, Flood 2014).
    """

    def __init__(self, size: int, seed: int, epoch: int = 0) -> None:
        if size < 1:
            raise ValueError(f"Permutation: expected size >= 1, got {size}")
        self.size = size
        self.keys = _keys(seed, epoch)
        bits = max(1, (size - 1).bit_length())
        self.low_bits = (bits + 1) // 2
        self.high_bits = bits - self.low_bits

    def __call__(self, positions: NDArray[np.integer]) -> NDArray[np.int64]:
        """Return the rows at some positions of the order.

        Args:
            positions: [B] integers in [0, n).

        Returns:
            [B] int64 in [0, n), no two equal for unequal positions.

        Raises:
            IndexError: a position outside, from where the walk might never come back.
        """
        if positions.size and not 0 <= positions.min() <= positions.max() < self.size:
            raise IndexError(
                f"Permutation: expected positions within [0, {self.size}), got "
                f"{positions.min()} to {positions.max()}"
            )
        index = self._network(positions.astype(np.uint64))
        outside = np.flatnonzero(index >= self.size)
        while len(outside):
            again = self._network(index[outside])
            index[outside] = again
            outside = outside[again >= self.size]
        return index.astype(np.int64)

    def _network(self, index: NDArray[np.uint64]) -> NDArray[np.uint64]:
        shift = np.uint64(self.low_bits)
        low_mask = np.uint64((1 << self.low_bits) - 1)
        high_mask = np.uint64((1 << self.high_bits) - 1)
        low, high = index & low_mask, index >> shift
        for number, key in enumerate(self.keys):
            if number % 2:
                high ^= _mix(low + key) & high_mask
            else:
                low ^= _mix(high + key) & low_mask
        return (high << shift) | low


def _mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Mix the bits of each value, in place."""
    value ^= value >> np.uint64(30)
    value *= _MIX_1
    value ^= value >> np.uint64(27)
    value *= _MIX_2
    value ^= value >> np.uint64(31)
    return value


def _keys(seed: int, epoch: int) -> NDArray[np.uint64]:
    """Round keys [_ROUNDS]: SplitMix64 started from both numbers."""
    with np.errstate(over="ignore"):
        state = np.array(
            [(seed + 3 * (seed >> 64)) % (1 << 64), epoch % (1 << 64)], dtype=np.uint64
        )
        start = _mix(_mix(state[:1] + _GOLDEN) + state[1:] * _GOLDEN)
        steps = np.arange(1, _ROUNDS + 1, dtype=np.uint64) * _GOLDEN
        return _mix(start + steps)
