# SPDX-License-Identifier: Apache-2.0
"""Reading and writing a store beside plain ways, on small stores."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sidechain.bench import results, store
from sidechain.bench import run as command
from sidechain.bench.config import BenchSettings
from sidechain.bench.machine import Machine
from sidechain.bench.store import Site
from sidechain.store import ActivationStore

SITE = Site("small", 6, 20)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "SITES", (SITE,))
    for name, value in (("BATCH", 64), ("READ_MIB", 0), ("PIECES", 5), ("ROUNDS", 1)):
        monkeypatch.setattr(store, name, value)


class TestRows:
    def test_reading(self, tmp_path: Path) -> None:
        rows = {row.provider: row for row in store.reading(SITE, tmp_path, 0.0)}
        assert list(rows) == ["memcpy", "gather", "batches", "index_select", "take"]
        assert rows["memcpy"].facts["of memcpy"] == 1.0
        assert {row.bytes for row in rows.values()} == {64 * 20 * 2}
        assert rows["gather"].kind == rows["batches"].kind == "ours"

    def test_a_way_that_reads_other_rows_is_an_error(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        right = ActivationStore.gather

        def wrong(self: ActivationStore, rows: Any, out: Any) -> None:
            right(self, rows[::-1].copy(), out)

        monkeypatch.setattr(ActivationStore, "gather", wrong)
        with pytest.raises(AssertionError, match="gather: expected the rows that were written"):
            store.reading(SITE, tmp_path, 0.0)

    def test_what_is_stored_is_finite(self, tmp_path: Path) -> None:
        x = store.fill(tmp_path, 20, 128)
        assert torch.isfinite(x).all()
        assert len(torch.unique(x, dim=0)) == 128

    def test_writing(self, tmp_path: Path) -> None:
        rows = store.writing(SITE, tmp_path)
        assert [row.provider for row in rows] == ["store", "files", "files, fsync"]
        assert rows[0].facts["x ours"] == 1.0
        assert rows[0].bytes == 5 * store.SAMPLES * 6 * 20 * 2
        assert list(tmp_path.iterdir()) == []


class TestCommand:
    def test_both_parts_and_what_is_kept(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(results, "commit", lambda: "abc1234")
        path = tmp_path / "r.json"
        settings = BenchSettings(section="store", seconds=0.0, json=path)
        first = command.run(settings)
        assert [(run["section"], run["op"]) for run in first] == [
            ("store", "read"),
            ("store", "write"),
        ]
        assert command.run(settings)[0]["rows"] == first[0]["rows"]
        (read,) = command.run(replace(settings, only="read", fresh=True))
        assert read["op"] == "read"

    def test_bad_input(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(ValueError, match=r"a part or a site of store \[read, .*got 'no'"):
            command.run(BenchSettings(section="store", only="no"))
        machine = Machine("cpu")
        machine.device = "cuda"
        with pytest.raises(ValueError, match=r"expected device cpu \[section store\], got 'cuda'"):
            next(store.parts(machine, "", 0.0))
