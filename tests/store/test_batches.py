# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sidechain.store import ActivationStore, Batches

from .conftest import UNIT_ROWS, UNITS

ROWS = UNITS * UNIT_ROWS


@pytest.fixture
def store(whole: Path) -> ActivationStore:
    return ActivationStore(whole, "cross:3")


def numbers(batches: Batches) -> Tensor:
    return torch.cat([batch.rows for batch in batches])


class TestOrder:
    @pytest.mark.parametrize("shuffle", ["rows", "blocks", "off"])
    @pytest.mark.parametrize("prefetch", [0, 2])
    def test_every_row_once(
        self,
        store: ActivationStore,
        expected: Callable[..., Tensor],
        shuffle: str,
        prefetch: int,
    ) -> None:
        batches = store.batches(64, shuffle=shuffle, prefetch=prefetch, drop_last=False)
        assert len(batches) == -(-ROWS // 64)
        found = list(batches)
        rows = torch.cat([b.rows for b in found])
        assert torch.equal(rows.sort()[0], torch.arange(ROWS))
        assert torch.equal(torch.cat([b.x for b in found]), expected()[rows])
        assert torch.equal(rows, torch.arange(ROWS)) == (shuffle == "off")

    def test_last_rows_are_dropped_unless_wanted(self, store: ActivationStore) -> None:
        assert [len(b.x) for b in store.batches(300)] == [300] * 3
        assert [len(b.x) for b in store.batches(300, drop_last=False)] == [300] * 3 + [100]

    def test_epochs_have_orders_of_their_own(self, store: ActivationStore) -> None:
        rows = numbers(store.batches(100, epochs=3, seed=5)).reshape(3, ROWS)
        assert torch.equal(rows.sort(1)[0], torch.arange(ROWS).expand(3, -1))
        assert not torch.equal(rows[0], rows[1])
        assert torch.equal(rows[:1].reshape(-1), numbers(store.batches(100, seed=5)))
        assert not torch.equal(rows[0], numbers(store.batches(100, seed=6)))

    def test_blocks_are_mixed_over_the_store(self, store: ActivationStore) -> None:
        rows = numbers(store.batches(100, shuffle="blocks"))
        assert len(set((rows[:200] // 64).tolist())) > 8  # blocks of 64 neighbours

    def test_without_end(self, store: ActivationStore) -> None:
        source = iter(store.batches(400, epochs=None))
        assert len({tuple(next(source).rows.tolist()) for _ in range(9)}) == 9


class TestResume:
    @pytest.mark.parametrize("shuffle", ["rows", "blocks", "off"])
    @pytest.mark.parametrize("taken", [0, 1, 10, 25])
    def test_goes_on_where_it_was(self, store: ActivationStore, shuffle: str, taken: int) -> None:
        options: dict[str, Any] = {"shuffle": shuffle, "epochs": 3, "seed": 2, "prefetch": 3}
        whole = [batch.rows for batch in store.batches(100, **options)]
        cut = store.batches(100, **options)
        source = iter(cut)
        for _ in range(taken):
            next(source)
        state = cut.state_dict()
        again = store.batches(100, **{**options, "seed": 0})
        again.load_state_dict(state)
        rest = [batch.rows for batch in again]
        assert len(rest) == 30 - taken
        for one, other in zip(rest, whole[taken:], strict=True):
            assert torch.equal(one, other)

    def test_another_batch_size_goes_on_at_the_same_row(self, store: ActivationStore) -> None:
        whole = numbers(store.batches(100))
        cut = store.batches(100)
        next(iter(cut))
        again = store.batches(50)
        again.load_state_dict(cut.state_dict())
        assert torch.equal(numbers(again), whole[100:])

    def test_refuses_another_store(self, store: ActivationStore) -> None:
        state = store.batches(10).state_dict()
        other = ActivationStore(store.folder, "cross:3", steps=[1])
        with pytest.raises(ValueError, match="expected a state with fingerprint"):
            other.batches(10).load_state_dict(state)
        with pytest.raises(ValueError, match="expected a state with shuffle off"):
            store.batches(10, shuffle="off").load_state_dict(state)
        state = store.batches(10, shuffle="blocks").state_dict()
        with pytest.raises(ValueError, match="expected batch_size 20"):
            store.batches(20, shuffle="blocks").load_state_dict(state)


class TestContent:
    def test_batches_that_are_kept_stay_as_they_are(
        self, store: ActivationStore, expected: Callable[..., Tensor]
    ) -> None:
        # Memory is used again, but not while a tensor, or a part of one, looks at it.
        kept = [(b.x[3:5, ::2], b.rows[3:5]) for b in store.batches(10, epochs=2)]
        for part, rows in kept:
            assert torch.equal(part, expected()[rows][:, ::2])

    def test_memory_is_used_again(self, store: ActivationStore) -> None:
        batches = store.batches(10, epochs=5)
        places = {batch.x.data_ptr() for batch in batches}
        assert len(places) < 12

    def test_labels(self, store: ActivationStore) -> None:
        for batch in store.batches(100, labels=True):
            assert batch.labels is not None
            assert torch.equal(batch.labels.prompt, batch.rows // UNIT_ROWS)

    def test_normalised_by_step(
        self, store: ActivationStore, expected: Callable[..., Tensor]
    ) -> None:
        (batch,) = store.batches(ROWS, normalise="step", labels=True)
        assert batch.labels is not None
        everything = expected().double()
        for step in range(4):
            x = batch.x[batch.labels.step == step].double()
            torch.testing.assert_close(x.mean(0), torch.zeros(37).double(), rtol=0, atol=1e-5)
            assert abs(float(x.square().mean()) - 1) < 1e-5
            raw = everything[batch.rows][batch.labels.step == step]
            wanted = (raw - raw.mean(0)) / raw.var(0, correction=0).mean().sqrt()
            torch.testing.assert_close(x, wanted, rtol=1e-5, atol=1e-5)

    def test_normalised_over_all(self, store: ActivationStore) -> None:
        (batch,) = store.batches(ROWS, normalise="global")
        assert float(batch.x.double().mean(0).abs().max()) < 1e-5
        assert abs(float(batch.x.double().square().mean()) - 1) < 1e-5

    def test_statistics_follow_the_filters(self, store: ActivationStore) -> None:
        some = ActivationStore(store.folder, "cross:3", steps=[1, 2], branches="cond")
        (batch,) = some.batches(len(some))
        total = some.statistics.total()
        assert total.count == len(some)
        torch.testing.assert_close(total.mean, batch.x.double().mean(0))

    def test_dtype(self, store: ActivationStore) -> None:
        (batch,) = store.batches(ROWS, dtype=torch.bfloat16)
        assert batch.x.dtype == torch.bfloat16

    def test_int8_is_float32(self, make: Callable[..., Path]) -> None:
        (batch,) = ActivationStore(make(dtype=torch.int8)).batches(ROWS)
        assert batch.x.dtype == torch.float32

    @pytest.mark.parametrize("prefetch", [0, 2])
    def test_target(
        self, store: ActivationStore, expected: Callable[..., Tensor], prefetch: int
    ) -> None:
        target = ActivationStore(store.folder, "bcd")
        for batch in store.batches(100, target=target, prefetch=prefetch):
            assert torch.equal(batch.x, expected()[batch.rows])
            assert torch.equal(batch.target, expected(site="bcd")[batch.rows])

    def test_parts_make_up_the_batch(self, store: ActivationStore) -> None:
        whole = list(store.batches(100, labels=True))
        parts = [list(store.batches(100, part=p, labels=True)) for p in ((0, 40), (40, 100))]
        for batch, first, second in zip(whole, *parts, strict=True):
            assert torch.equal(batch.x, torch.cat([first.x, second.x]))
            assert torch.equal(batch.rows, torch.cat([first.rows, second.rows]))

    @pytest.mark.gpu
    @pytest.mark.parametrize("dtype", [torch.float16, torch.int8], ids=str)
    def test_on_cuda(self, make: Callable[..., Path], dtype: torch.dtype) -> None:
        store = ActivationStore(make(dtype=dtype))
        options: dict[str, Any] = {"normalise": "step", "epochs": 3}
        on_cpu = store.batches(64, **options)
        for batch, wanted in zip(store.batches(64, device="cuda", **options), on_cpu, strict=True):
            assert batch.x.is_cuda
            torch.testing.assert_close(batch.x.cpu(), wanted.x)


class TestThread:
    def test_ends_with_the_consumer(self, store: ActivationStore) -> None:
        source = iter(store.batches(10, epochs=None))
        next(source)
        assert any(t.name == "sidechain-prefetch" for t in threading.enumerate())
        source.close()  # type: ignore[attr-defined]
        assert not any(t.name == "sidechain-prefetch" for t in threading.enumerate())

    def test_its_errors_reach_the_consumer(
        self, store: ActivationStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*args: Any) -> None:
            raise OSError("the disk is gone")

        monkeypatch.setattr(store, "gather", fail)
        with pytest.raises(OSError, match="the disk is gone"):
            next(iter(store.batches(10)))


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"batch_size": 0}, ValueError, "expected 1 <= batch_size <= 1000"),
    ({"batch_size": 1001}, ValueError, r"expected 1 <= batch_size <= 1000 \[rows"),
    ({"batch_size": 10.0}, TypeError, "expected batch_size as int, got 10.0"),
    ({"shuffle": "yes"}, ValueError, "expected shuffle to be one of rows, blocks, off"),
    ({"batchsize": 10}, TypeError, "unexpected keyword argument 'batchsize'"),
    ({"normalise": "row"}, ValueError, "expected normalise to be one of step, global"),
    ({"part": (5, 5)}, ValueError, "expected 0 <= first < last <= 10 in part"),
    ({"part": (0, 5), "drop_last": False}, NotImplementedError, "expected drop_last with part"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_bad_options(
    store: ActivationStore, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        store.batches(**{"batch_size": 10, **options})


def test_a_target_of_other_rows_is_refused(store: ActivationStore) -> None:
    with pytest.raises(ValueError, match="expected 1000 rows in the target"):
        store.batches(10, target=ActivationStore(store.folder, "bcd", steps=[0]))
