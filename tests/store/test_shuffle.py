# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidechain.store import Permutation

SEEDS = st.integers(-(2**70), 2**70)


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 5000), seed=SEEDS, epoch=st.integers(0, 2**40))
def test_is_a_bijection(size: int, seed: int, epoch: int) -> None:
    order = Permutation(size, seed, epoch)(np.arange(size))
    assert np.array_equal(np.sort(order), np.arange(size))


@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, 2**62), seed=SEEDS, start=st.integers(0, 2**62))
def test_any_position_of_any_size(size: int, seed: int, start: int) -> None:
    positions = np.unique((start + np.arange(100)) % size)
    order = Permutation(size, seed)
    found = order(positions)
    assert found.min() >= 0 and found.max() < size
    assert len(np.unique(found)) == len(positions)
    assert np.array_equal(found[::-1], order(positions[::-1]))  # each by itself


def test_seed_and_epoch_choose_the_order() -> None:
    positions = np.arange(1000)
    orders = [Permutation(1000, *key)(positions) for key in ((0, 0), (0, 1), (1, 0), (-1, 0))]
    assert np.array_equal(orders[0], Permutation(1000, 0, 0)(positions))
    for i, first in enumerate(orders):
        for second in orders[:i]:
            assert np.mean(first == second) < 0.02  # 1 / 1000 by chance


def test_looks_random() -> None:
    # Against what a uniformly random permutation gives: no correlation of place and value, pairs of
    # neighbours in a 16 x 16 table of bins that are equally full (chi-square, 255 degrees).
    size = 1 << 16
    order = Permutation(size, 7)(np.arange(size))
    assert abs(np.corrcoef(np.arange(size), order)[0, 1]) < 5 / np.sqrt(size)
    steps = np.abs(np.diff(order))
    assert abs(steps.mean() / (size / 3) - 1) < 0.02
    table = np.histogram2d(order[:-1], order[1:], bins=16)[0]
    expected = (size - 1) / 256
    assert ((table - expected) ** 2 / expected).sum() < 255 + 5 * np.sqrt(2 * 255)


def test_orders_do_not_change_between_versions() -> None:
    # A checkpoint stores (seed, epoch, position): the order behind it is part of the format.
    assert Permutation(10, 0)(np.arange(10)).tolist() == [7, 3, 4, 0, 8, 1, 9, 5, 2, 6]
    assert Permutation(1000, 42, 3)(np.arange(5)).tolist() == [127, 179, 985, 568, 703]


@pytest.mark.parametrize(
    ("key", "checksum"),
    [
        ((208_000, 0, 0), 0x903749F8),
        ((1 << 20, -3, 7), 0x288AFCDD),
        (((1 << 62) - 5, 2**70 + 1, 2**40), 0xB81B6267),
    ],
)
def test_long_orders_do_not_change_between_versions(
    key: tuple[int, int, int], checksum: int
) -> None:
    positions = key[0] - 100_000 + np.arange(100_000)
    assert zlib.crc32(Permutation(*key)(positions).astype("<i8").tobytes()) == checksum


@pytest.mark.parametrize("position", [-1, 5])
def test_refuses_a_position_outside(position: int) -> None:
    with pytest.raises(IndexError, match=r"expected positions within \[0, 5\), got"):
        Permutation(5, 0)(np.array([position]))


def test_refuses_nothing_to_permute() -> None:
    with pytest.raises(ValueError, match="expected size >= 1, got 0"):
        Permutation(0, 0)
