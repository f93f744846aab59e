# SPDX-License-Identifier: Apache-2.0
"""Death at every system call that changes a store, and what is left of it."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sidechain import Where
from sidechain.store import (
    ActivationStore,
    ActivationWriter,
    Sampling,
    Storage,
    record,
)
from sidechain.testing import tiny_pipeline

from .conftest import UNIT_ROWS, WIDTH, write_unit

SITES = ("a", "cross:3")
CALLS = ("writev", "fsync", "replace", "ftruncate", "unlink", "mkdir", "open")
TOTAL = 5


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A fork has none of the threads of OpenMP, and other sums have other roundings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write_some(folder: Path, units: int = TOTAL) -> None:
    """Write, or continue to write, a store of two sites with several commits."""
    storage = Storage(torch.float32, shard_bytes=2 * UNIT_ROWS * WIDTH * 4)
    with ActivationWriter(folder, dict.fromkeys(SITES, WIDTH), storage, mode="resume") as writer:
        for unit in range(writer.cursor, units):
            write_unit(writer, unit)
            if unit % 2:
                writer.flush()


def forked(work: Callable[[], None]) -> int:
    """Run in a fork, without leaving it by anything but death; return the wait status."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1]


def hook(patch: pytest.MonkeyPatch, before: Callable[[], None]) -> None:
    """Call `before()` in front of every system call that changes files, but for its own."""
    inside = False

    def wrap(inner: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            if not inside:
                inside = True
                before()
                inside = False
            return inner(*args, **kwargs)

        return call

    for name in CALLS:
        patch.setattr(os, name, wrap(getattr(os, name)))


def check(folder: Path, expected: Callable[..., Tensor]) -> None:
    """Whatever is committed is whole: both sites hold the same complete units, and no other."""
    try:
        stores = [ActivationStore(folder, site) for site in SITES]
    except FileNotFoundError:
        return  # died before there was a store
    assert len({len(store) for store in stores}) == 1
    units, rest = divmod(len(stores[0]), UNIT_ROWS)
    assert rest == 0
    for store in stores:
        store.verify()
        assert torch.equal(store.read(range(len(store))), expected(units, store.site))
        assert store.statistics.total().count == len(store)


def test_kill_at_every_call(tmp_path: Path, expected: Callable[..., Tensor]) -> None:
    # What kill -9 leaves behind is the folder as it was before the call that was not made.
    whole, states = tmp_path / "whole", []

    def keep() -> None:
        states.append(tmp_path / f"{len(states):03d}")
        if whole.exists():
            shutil.copytree(whole, states[-1])

    with pytest.MonkeyPatch.context() as patch:
        hook(patch, keep)
        write_some(whole)
    assert len(states) > 60
    survived = set()
    for number, folder in enumerate(states):
        check(folder, expected)
        if (folder / "manifest.json").exists():
            survived.add(len(ActivationStore(folder, SITES[0])))
        if number % 4 == 0:  # continuing costs more than dying
            write_some(folder)
            check(folder, expected)
            store = ActivationStore(folder, SITES[0])
            assert len(store) == TOTAL * UNIT_ROWS
            files = [p for p in folder.rglob("*") if p.is_file()]
            named = 2 + 1 + sum(len(s.shards) for s in store._manifest.sites.values())
            assert len(files) == named  # manifest, lock, statistics, shards: nothing left over
    assert len(survived) >= 4  # the states are of different stages


def committed(folder: Path) -> int:
    """Rows that a reader would see now."""
    if not (folder / "manifest.json").exists():
        return 0
    return len(ActivationStore(folder, "cross:1"))


def test_kill_while_recording(tmp_path: Path) -> None:
    prompts = [f"w{i} piano song" for i in range(6)]
    options: dict[str, Any] = {
        "num_inference_steps": 2,
        "sampling": Sampling(batch_size=2),
        "storage": Storage(torch.float32, shard_bytes=8000),
        "progress": False,
    }
    pipe = tiny_pipeline()
    where = Where("cross:0-1", "all")
    record(pipe, where, prompts, tmp_path / "whole", **options)
    folder = tmp_path / "cut"

    def work() -> None:
        inner, calls = type(pipe).__call__, []

        def dies_in_the_third_batch(self: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == 3:
                deadline = time.monotonic() + 60
                while committed(folder) == 0 and time.monotonic() < deadline:
                    time.sleep(0.01)
                os.kill(os.getpid(), signal.SIGKILL)
            return inner(self, *args, **kwargs)

        type(pipe).__call__ = dies_in_the_third_batch
        record(pipe, where, prompts, folder, **options)

    assert os.WTERMSIG(forked(work)) == signal.SIGKILL
    before = len(ActivationStore(folder, "cross:1"))
    ran = []
    tap = type(pipe).__call__
    pipe.transformer.register_forward_pre_hook(lambda m, a: ran.append(1))
    stores = record(pipe, where, prompts, folder, **options)
    assert type(pipe).__call__ is tap
    assert 0 < before < len(stores["cross:1"])
    assert len(ran) < 2 * len(prompts) // 2  # prompts that were there were not run again
    for site, store in stores.items():
        whole = ActivationStore(tmp_path / "whole", site)
        everything = range(len(whole))
        assert torch.equal(store.read(everything), whole.read(everything))
        assert torch.equal(store.labels(everything).prompt, whole.labels(everything).prompt)


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_an_exception_inside_a_unit_forgets_it(
    tmp_path: Path, expected: Callable[..., Tensor], kind: type[BaseException]
) -> None:
    folder = tmp_path / "s"
    with (
        pytest.raises(kind),
        ActivationWriter(folder, dict.fromkeys(SITES, WIDTH), Storage(torch.float32)) as writer,
    ):
        for unit in range(3):
            write_unit(writer, unit)
        with writer.transaction(cursor=99):
            writer.write({"a": torch.ones(7, WIDTH)})
            raise kind
    check(folder, expected)
    assert len(ActivationStore(folder, "a")) == 3 * UNIT_ROWS
    write_some(folder)
    check(folder, expected)
    assert len(ActivationStore(folder, "a")) == TOTAL * UNIT_ROWS


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with (
        ActivationWriter(tmp_path / "s", {"a": 2}),
        pytest.raises(RuntimeError, match="expected to be the only writer"),
    ):
        ActivationWriter(tmp_path / "s", {"a": 2}, mode="resume")
    ActivationWriter(tmp_path / "s", {"a": 2}, mode="resume").close()
