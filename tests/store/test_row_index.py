# SPDX-License-Identifier: Apache-2.0
"""Finding rows by number, and copying them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidechain import _native
from sidechain.store import row_index
from sidechain.store.row_index import RowIndex

host: Any = _native.host()
needs_host = pytest.mark.skipif(host is None, reason=f"_host {_native.absent('_host')}")


@settings(max_examples=60, deadline=None)
@given(
    keep=st.lists(st.lists(st.booleans(), max_size=40).map(lambda m: np.array(m, bool)), max_size=5)
)
def test_locate_finds_every_row(keep: list[np.ndarray]) -> None:
    index = RowIndex(keep)
    pairs = [(s, r) for s, mask in enumerate(keep) for r in np.flatnonzero(mask)]
    assert len(index) == len(pairs)
    rows = np.random.default_rng(0).permutation(len(pairs))
    assert list(zip(*index.locate(rows), strict=True)) == [pairs[row] for row in rows]


@pytest.mark.parametrize("row", [-1, 4])
def test_locate_refuses_rows_that_do_not_exist(row: int) -> None:
    index = RowIndex([np.array([True, False, True]), np.ones(2, bool)])
    with pytest.raises(IndexError, match=r"locate: expected rows within \[0, 4\), got"):
        index.locate(np.array([row]))


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
    row_index.gather_rows(shards, shard, row, guarded[2:-2])
    wanted = np.stack([shards[s][r] for s, r in zip(shard, row, strict=True)])
    assert np.array_equal(guarded[2:-2], wanted)
    assert (guarded[:2] == 7).all() and (guarded[-2:] == 7).all()
    monkeypatch.setattr(_native, "host", lambda: None)
    again = np.zeros_like(wanted)
    row_index.gather_rows(shards, shard, row, again)
    assert np.array_equal(again, wanted)


@needs_host
@pytest.mark.parametrize("shift", [0, 1, 13])
@pytest.mark.parametrize("row_bytes", [7, 63, 65, 80, 2560, 40000])
def test_gather_past_the_caches(row_bytes: int, shift: int) -> None:
    """Output of 4 MiB and more is written another way, at any alignment of its rows."""
    random = np.random.default_rng(0)
    source = random.integers(0, 256, (300, row_bytes), dtype=np.uint8)
    count = (4 << 20) // row_bytes + 3
    row = random.integers(0, len(source), count)
    memory = np.full(count * row_bytes + 64, 7, np.uint8)
    out = memory[16 + shift :][: count * row_bytes].reshape(count, row_bytes)
    host.gather_rows([source], np.zeros_like(row), row, out)
    assert np.array_equal(out, source[row])
    assert (memory[: 16 + shift] == 7).all()
    assert (memory[16 + shift + out.size :] == 7).all()


@needs_host
@pytest.mark.parametrize(("shard", "row"), [([2], [0]), ([-1], [0]), ([0], [3]), ([0], [-1])])
def test_gather_refuses_rows_that_do_not_exist(shard: list[int], row: list[int]) -> None:
    shards = [np.zeros((3, 8), np.uint8), np.zeros((1, 8), np.uint8)]
    with pytest.raises(IndexError, match="expected rows of 2 shards"):
        host.gather_rows(shards, np.array(shard), np.array(row), np.zeros((1, 8), np.uint8))


@needs_host
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
