# SPDX-License-Identifier: Apache-2.0
"""The native forms of the order and of the gather against the NumPy ones, bit by bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidechain import _native
from sidechain.store import Permutation, gather

host: Any = _native.host()
pytestmark = pytest.mark.skipif(host is None, reason=f"_host {_native.absent('_host')}")


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 2**62), seed=st.integers(-(2**64), 2**64), start=st.integers(0))
def test_permute_is_the_definition(size: int, seed: int, start: int) -> None:
    order = Permutation(size, seed, epoch=3)
    positions = (start + np.arange(70, dtype=object)) % size
    positions = positions.astype(np.int64)
    assert np.array_equal(order(positions), order.reference(positions))


@pytest.mark.parametrize("row_bytes", [1, 11, 63, 64, 65, 320, 2560, 4095, 4097, 9001])
def test_gather_any_row_size(row_bytes: int, tmp_path: Path, monkeypatch: Any) -> None:
    random = np.random.default_rng(0)
    shards = []
    for number, rows in enumerate((5, 1, 37)):
        path = tmp_path / f"{number}"
        random.integers(0, 256, (rows, row_bytes), dtype=np.uint8).tofile(path)
        shards.append(np.memmap(path, np.uint8, "r", shape=(rows, row_bytes)))
    shard = random.integers(0, 3, 200)
    row = np.array([random.integers(0, len(shards[s])) for s in shard])
    guarded = np.full((204, row_bytes), 7, np.uint8)  # two rows on each side must stay
    gather.gather_rows(shards, shard, row, guarded[2:-2])
    wanted = np.stack([shards[s][r] for s, r in zip(shard, row, strict=True)])
    assert np.array_equal(guarded[2:-2], wanted)
    assert (guarded[:2] == 7).all() and (guarded[-2:] == 7).all()
    monkeypatch.setattr(_native, "host", lambda: None)
    again = np.zeros_like(wanted)
    gather.gather_rows(shards, shard, row, again)
    assert np.array_equal(again, wanted)


@pytest.mark.parametrize(("shard", "row"), [([2], [0]), ([-1], [0]), ([0], [3]), ([0], [-1])])
def test_gather_refuses_rows_that_do_not_exist(shard: list[int], row: list[int]) -> None:
    shards = [np.zeros((3, 8), np.uint8), np.zeros((1, 8), np.uint8)]
    with pytest.raises(IndexError, match="expected rows of 2 shards"):
        host.gather_rows(shards, np.array(shard), np.array(row), np.zeros((1, 8), np.uint8))


def test_gather_refuses_what_does_not_fit() -> None:
    one = np.zeros(1, np.int64)
    with pytest.raises(ValueError, match=r"expected shards \[n, 4\]"):
        host.gather_rows([np.zeros((3, 8), np.uint8)], one, one, np.zeros((1, 4), np.uint8))
    with pytest.raises(ValueError, match="expected out"):
        host.gather_rows([np.zeros((3, 8), np.uint8)], one, one, np.zeros((2, 8), np.uint8))
    with pytest.raises(TypeError):  # a copy would be written instead of this one
        host.gather_rows(
            [np.zeros((3, 8), np.uint8)], one, one, np.zeros((1, 16), np.uint8)[:, ::2]
        )


def test_permute_refuses_a_position_outside() -> None:
    with pytest.raises(IndexError, match=r"expected positions within \[0, 5\), got 5"):
        host.permute(np.array([5]), 5, Permutation(5, 0).keys)
