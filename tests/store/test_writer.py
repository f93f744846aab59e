# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sidechain.store import ActivationStore, ActivationWriter, Storage
from sidechain.store.transaction import Appender

from .conftest import UNIT_ROWS, WIDTH, write_unit

UNIT_BYTES = UNIT_ROWS * WIDTH * 4


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """While it is not set, the writer thread stands still: a disk that is too slow."""
    event, inner = threading.Event(), Appender.append

    def append(self: Appender, *args: Any) -> None:
        event.wait(30)
        inner(self, *args)

    monkeypatch.setattr(Appender, "append", append)
    return event


def small_queue(folder: Path) -> ActivationWriter:
    storage = Storage(torch.float32, queue_bytes=3 * UNIT_BYTES)
    return ActivationWriter(folder, {"cross:3": WIDTH}, storage)


class TestFullQueue:
    def test_writing_waits_and_bounds_memory(
        self, tmp_path: Path, gate: threading.Event, expected: Callable[..., Tensor]
    ) -> None:
        writer = small_queue(tmp_path / "s")
        done = []

        def produce() -> None:
            for unit in range(10):
                write_unit(writer, unit)
                done.append(unit)

        producer = threading.Thread(target=produce)
        producer.start()
        producer.join(0.5)
        assert producer.is_alive() and len(done) <= 3  # the queue holds three
        gate.set()
        producer.join(30)
        writer.close()
        assert writer.peak_bytes <= 3 * UNIT_BYTES
        assert torch.equal(ActivationStore(tmp_path / "s").read(range(250)), expected(10))


class TestInput:
    def test_ready_is_awaited_before_rows_are_read(self, tmp_path: Path) -> None:
        rows = torch.zeros(5, 2, dtype=torch.float16)
        with ActivationWriter(tmp_path / "s", {"a": 2}) as writer:
            writer.write({"a": rows}, copy=False, ready=lambda: rows.fill_(3.0))
        assert torch.equal(ActivationStore(tmp_path / "s").read(range(5)), torch.full_like(rows, 3))

    def test_rows_may_be_written_again_by_the_caller(
        self, tmp_path: Path, gate: threading.Event
    ) -> None:
        rows = torch.ones(5, 2, dtype=torch.float16)
        with ActivationWriter(tmp_path / "s", {"a": 2}) as writer:
            writer.write({"a": rows})
            rows.zero_()
            gate.set()
        assert bool((ActivationStore(tmp_path / "s").read(range(5)) == 1).all())

    def test_strides_and_labels_of_every_row(self, tmp_path: Path) -> None:
        wide = torch.randn(6, 8).T[::2]
        with ActivationWriter(tmp_path / "s", {"a": 6}, Storage(torch.float32)) as writer:
            writer.write(
                {"a": wide},
                step=[3, 1, 3, 1],
                branch=torch.tensor([0, 1, 1, 0]),
                prompt=[9, 8, 7, 6],
                token=[5, 5, 6, 6],
            )
        store = ActivationStore(tmp_path / "s")
        assert torch.equal(store.read(range(4)), wide)
        labels = store.labels([1, 0, 2])
        found = (labels.step, labels.branch, labels.prompt, labels.token)
        assert [t.tolist() for t in found] == [[1, 3, 3], [1, 0, 1], [8, 9, 7], [5, 5, 6]]
        assert {c: m.count for c, m in store.statistics.cells.items()} == {
            (3, 0): 1, (1, 1): 1, (3, 1): 1, (1, 0): 1,
        }  # fmt: skip

    def test_no_rows(self, tmp_path: Path) -> None:
        with ActivationWriter(tmp_path / "s", {"a": 6}) as writer:
            writer.write({"a": torch.empty(0, 6)})
        assert len(ActivationStore(tmp_path / "s")) == 0


BAD_WRITES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"rows": torch.ones(2, 3)}, TypeError, "expected rows as"),
    ({"rows": {}}, TypeError, "expected rows as"),
    ({"rows": {"b": torch.ones(2, 3)}}, ValueError, "expected a site of"),
    ({"rows": {"a": torch.ones(2, 4)}}, ValueError, r"expected rows \[n, 3\] at a, got \[2, 4\]"),
    ({"rows": {"a": torch.ones(3)}}, ValueError, r"expected rows \[n, 3\] at a, got \[3\]"),
    ({"rows": {"a": [[1.0]]}}, TypeError, "at a, got list"),
    ({"rows": {"a": torch.ones(2, 3).double()}}, TypeError, "at a, got torch.float64"),
    ({"rows": {"a": torch.ones(2, 3).to(torch.int8)}}, TypeError, "expected float rows"),
    ({"step": -1}, ValueError, r"expected step within \[0, 65535\], got -1"),
    ({"step": 1.5}, TypeError, "expected integers in step, got float64"),
    ({"step": [0, 1, 2]}, ValueError, r"expected step as a number or of shape \[2\]"),
    ({"branch": "both"}, ValueError, "expected branch to be one of cond, uncond, got 'both'"),
    ({"branch": 2}, ValueError, r"expected branch within \[0, 2\), got 2"),
    ({"branch": [0, 2]}, ValueError, r"expected branch within \[0, 2\)"),
    ({"token": [0]}, ValueError, r"expected token as a number or of shape \[2\]"),
]

BAD_WRITERS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"sites": {}}, TypeError, "expected sites as"),
    ({"sites": {"a": 0}}, ValueError, "expected a width >= 1 of a, got 0"),
    ({"sites": {"a:1": 2, "a-1": 2}}, ValueError, "expected sites with different folder names"),
    ({"mode": "w"}, ValueError, "expected mode to be one of create, append, resume"),
    ({"branches": []}, ValueError, "expected 1 to 255 branches, got 0"),
    ({"mode": "append"}, FileNotFoundError, r"expected a store \[mode='append'\], got none"),
]

BAD_STORAGE: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"dtype": torch.float64}, TypeError, "expected dtype float32"),
    ({"queue_bytes": 0}, ValueError, "expected queue_bytes >= 1"),
    ({"shard_bytes": 1.5}, ValueError, "expected shard_bytes >= 1"),
]


@pytest.mark.parametrize(("given", "error", "message"), BAD_STORAGE)
def test_bad_storage(given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Storage(**given)


class TestErrors:
    @pytest.mark.parametrize(("given", "error", "message"), BAD_WRITES)
    def test_write(
        self, tmp_path: Path, given: dict[str, Any], error: type[Exception], message: str
    ) -> None:
        with ActivationWriter(tmp_path / "s", {"a": 3}) as writer:
            call = {"rows": {"a": torch.ones(2, 3)}, **given}
            with pytest.raises(error, match=message):
                writer.write(call.pop("rows"), **call)
            writer.write({"a": torch.ones(1, 3)})  # it is as good as before
        assert len(ActivationStore(tmp_path / "s")) == 1

    @pytest.mark.parametrize(("given", "error", "message"), BAD_WRITERS)
    def test_writer(
        self, tmp_path: Path, given: dict[str, Any], error: type[Exception], message: str
    ) -> None:
        options = {"sites": {"a": 3}, **given}
        with pytest.raises(error, match=message):
            ActivationWriter(tmp_path / "s", **options)
        assert not (tmp_path / "s" / "manifest.json").exists()

    @pytest.mark.parametrize(
        ("other", "message"),
        [
            ({"storage": Storage(torch.float32)}, "expected dtype float16 .*got float32"),
            ({"sites": {"a": 4}}, r"expected sites \{'a': 3\} .*got \{'a': 4\}"),
            ({"branches": ["x"]}, "expected branches"),
        ],
    )
    def test_a_store_of_another_kind(
        self, tmp_path: Path, other: dict[str, Any], message: str
    ) -> None:
        ActivationWriter(tmp_path / "s", {"a": 3}).close()
        with pytest.raises(ValueError, match=message):
            ActivationWriter(tmp_path / "s", **{"sites": {"a": 3}, "mode": "append", **other})

    def test_create_does_not_overwrite(self, tmp_path: Path) -> None:
        ActivationWriter(tmp_path / "s", {"a": 3}).close()
        with pytest.raises(FileExistsError, match=r"without a store \[mode='create'\]"):
            ActivationWriter(tmp_path / "s", {"a": 3})

    def test_closed(self, tmp_path: Path) -> None:
        writer = ActivationWriter(tmp_path / "s", {"a": 3})
        writer.close()
        writer.close()
        with pytest.raises(RuntimeError, match="expected an open writer"):
            writer.write({"a": torch.ones(1, 3)})

    def test_a_unit_in_a_unit(self, tmp_path: Path) -> None:
        with (
            ActivationWriter(tmp_path / "s", {"a": 3}) as writer,
            writer.transaction(),
            pytest.raises(RuntimeError, match="expected no transaction inside of a transaction"),
            writer.transaction(),
        ):
            pass
