# SPDX-License-Identifier: Apache-2.0
"""Rows on their way to a GPU: the right ones, and nobody waits for them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from gpu.support import side_stream
from gpu.waits import META, waits_of
from sidechain.sae import IterableSource, Mesh, PipelineSource, Rows, StoreSource
from sidechain.store import ActivationStore, ActivationWriter, Storage

WIDTH, UNITS, UNIT_ROWS = 37, 40, 25
STORED = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8}


@pytest.fixture
def store(tmp_path: Path, request: pytest.FixtureRequest) -> ActivationStore:
    dtype = getattr(request, "param", torch.float32)
    return ActivationStore(_written(tmp_path / "acts", dtype), "a")


def _written(folder: Path, dtype: torch.dtype) -> Path:
    """Two sites with rows whose scale and mean depend on the step."""
    generator = torch.Generator().manual_seed(3)
    sites = {"a": WIDTH, "b": WIDTH + 3}
    with ActivationWriter(folder, sites, Storage(dtype, shard_bytes=20_000)) as writer:
        for unit in range(UNITS):
            rows = {
                s: torch.randn(UNIT_ROWS, w, generator=generator) * (1 + unit % 4) + unit % 4
                for s, w in sites.items()
            }
            with writer.transaction(cursor=unit + 1):
                for site in sites:
                    writer.write({site: rows[site]}, step=unit % 4, branch="cond", prompt=unit)
    return folder


@pytest.mark.parametrize("normalise", [None, "step", "global"])
@pytest.mark.parametrize("store", STORED.values(), ids=STORED.keys(), indirect=True)
def test_batches_hold_the_rows(device: str, store: ActivationStore, normalise: str | None) -> None:
    """Three epochs through two staging buffers, behind work that keeps the stream busy."""
    options: dict[str, Any] = {"normalise": normalise, "epochs": 3, "labels": True}
    options["target"] = ActivationStore(store.folder, "b")
    wanted = store.batches(64, prefetch=0, **options)
    busy = torch.randn(600, 600, device=device)
    kept = []
    with side_stream(device):
        for batch in store.batches(64, device=device, **options):
            busy @= busy.softmax(1)
            assert batch.step is not None and batch.x.device == batch.step.device == busy.device
            kept.append((batch.x.clone(), batch.step.clone(), batch.target.clone(), batch.rows))
    for (x, step, target, rows), batch in zip(kept, wanted, strict=True):
        assert torch.equal(rows, batch.rows)
        assert torch.equal(step.cpu(), batch.labels.step)
        for got, expected in ((x, batch.x), (target, batch.target)):
            if normalise is None and store.dtype != torch.int8:
                assert torch.equal(got.cpu(), expected)
            else:
                torch.testing.assert_close(got.cpu(), expected)


def test_last_batch_may_be_short(device: str, store: ActivationStore) -> None:
    found = list(store.batches(300, device=device, drop_last=False, shuffle="off"))
    assert [len(b.x) for b in found] == [300, 300, 300, 100]
    whole = torch.cat([b.x for b in store.batches(1000, shuffle="off")])
    assert torch.equal(torch.cat([b.x.cpu() for b in found]), whole)


# On the CPU the reader's own thread would not be seen.
@pytest.mark.parametrize("normalise", [None, "step", "global"])
def test_batches_wait_for_nothing(
    device: str, store: ActivationStore, normalise: str | None
) -> None:
    place, ahead = (device, 2) if device == "cuda" else ("meta", 0)
    target = ActivationStore(store.folder, "b")
    batches = iter(
        store.batches(
            64, device=place, normalise=normalise, labels=True, prefetch=ahead, target=target
        )
    )
    next(batches)
    with waits_of(device) as waits:
        for batch in batches:
            assert batch.x.device.type == batch.step.device.type == torch.device(place).type
    assert waits == []


def _items() -> list[Rows]:
    generator = torch.Generator().manual_seed(1)
    return [
        Rows(torch.randn(30, 8, generator=generator), torch.full((30,), n), torch.randn(30, 5))
        for n in range(12)
    ]


@pytest.mark.parametrize("kind", ["store", "iterable", "pipeline"])
def test_sources_wait_for_nothing(
    device: str, kind: str, store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device == "cpu":  # the look-out sees one thread

        def at_once(plan: Any, load: Any, depth: int) -> Any:
            return ((place, load(place, rows)) for place, rows in plan)

        monkeypatch.setattr("sidechain.store.batches._ahead", at_once)
    if kind == "store":
        source: Any = StoreSource(store, ActivationStore(store.folder, "b"))
    elif kind == "iterable":
        source = IterableSource(_items())
    else:
        from sidechain.testing import tiny_pipeline

        source = PipelineSource(
            tiny_pipeline("music"), "cross:1", ["piano", "drums"], buffer=1 << 9, batch_size=2,
            num_inference_steps=2,
        )  # fmt: skip
    place = torch.device(device if device == "cuda" else META)
    batches = source.batches(40, 0, Mesh(), place)
    next(batches)
    with waits_of(device) as waits:
        for rows in itertools.islice(batches, 5):
            assert all(t is None or t.device.type == place.type for t in rows)
    assert waits == []


def test_iterables_give_their_rows_in_order(device: str) -> None:
    found = list(IterableSource(_items()).batches(40, 1, Mesh(), torch.device(device)))
    for place, whole in enumerate(zip(*_items(), strict=True)):
        if place < 2:  # targets are drawn anew
            got = torch.cat([rows[place].cpu() for rows in found])
            assert torch.equal(got, torch.cat(whole)[40:])
