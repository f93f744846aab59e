# SPDX-License-Identifier: Apache-2.0
"""Torn, truncated, flipped and missing files; full disks."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sidechain.store import ActivationStore, ActivationWriter, Storage

from .conftest import UNIT_ROWS, UNITS, WIDTH, rows_of, write_unit

ROWS = UNITS * UNIT_ROWS
VICTIM = "cross-3/00002.rows"


def verified(folder: Path) -> ActivationStore:
    store = ActivationStore(folder)
    store.verify()
    return store


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (lambda p: os.truncate(p, p.stat().st_size - 1), r"\d+ bytes in .*VICTIM"),
    "torn": (lambda p: os.truncate(p, 100), r"bytes in .*VICTIM .*got 100$"),
    "empty": (lambda p: os.truncate(p, 0), r"bytes in .*VICTIM .*got 0$"),
    "longer": (lambda p: os.truncate(p, p.stat().st_size + 1), r"\d+ bytes in .*VICTIM"),
    "missing": (lambda p: p.unlink(), "to read .*VICTIM, got No such file"),
    "flipped label": (lambda p: flip(p, p.stat().st_size - 30), "of the labels in .*VICTIM"),
    "flipped checksum": (lambda p: flip(p, p.stat().st_size - 1), "of the labels in .*VICTIM"),
}


class TestShards:
    @pytest.mark.parametrize("kind", DAMAGE)
    def test_is_named(self, make: Callable[..., Path], kind: str) -> None:
        folder = make(sites=("cross:3", "b"))
        harm, message = DAMAGE[kind]
        harm(folder / VICTIM)
        with pytest.raises(
            ValueError, match="store: expected .*" + message.replace("VICTIM", VICTIM)
        ):
            ActivationStore(folder, "cross:3")
        assert len(ActivationStore(folder, "b")) == ROWS  # other sites are untouched

    def test_every_flipped_bit_of_the_rows_is_found(self, tmp_path: Path) -> None:
        with ActivationWriter(tmp_path, {"a": 64}, Storage(torch.float32)) as writer:
            writer._appender.manifest.block_bytes = 64 * 4 * 100
            for part in torch.randn(950, 64).split(33):
                writer.write({"a": part})
        store, path = ActivationStore(tmp_path), tmp_path / "a/00000.rows"
        store.verify()
        for offset in range(0, 950 * 64 * 4, 9973):
            flip(path, offset)
            first = offset // (64 * 4 * 100) * 100
            rows = f"rows {first} to {min(first + 100, 950) - 1} in {path}"
            with pytest.raises(ValueError, match=f"expected CRC-32 .* of {rows}"):
                store.verify()
            flip(path, offset)
        store.verify()


class TestOtherFiles:
    def test_statistics_are_counted_again(self, make: Callable[..., Path]) -> None:
        folder = make()
        before = ActivationStore(folder).statistics
        (path,) = folder.glob("statistics-*")
        for harm in (lambda: flip(path, 200), lambda: os.truncate(path, 50), path.unlink):
            harm()
            with pytest.warns(RuntimeWarning, match=f"damaged {path}.*counting {ROWS} rows"):
                after = ActivationStore(folder).statistics
            assert after.cells.keys() == before.cells.keys()
            for cell, wanted in before.cells.items():
                assert after.cells[cell].count == wanted.count
                np.testing.assert_allclose(after.cells[cell].m2, wanted.m2, rtol=1e-10)

    def test_statistics_are_not_counted_of_damaged_rows(self, make: Callable[..., Path]) -> None:
        folder = make()
        next(folder.glob("statistics-*")).unlink()
        flip(folder / VICTIM, 10)
        with (
            pytest.warns(RuntimeWarning, match="counting"),
            pytest.raises(ValueError, match=f"CRC-32 .* of rows 0 to .* in .*{VICTIM}"),
        ):
            ActivationStore(folder)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("", "expected a manifest in"),
            ("[]", "expected a manifest in"),
            ('{"format": "other", "version": 1}', "expected sidechain-store version 1"),
            ('{"format": "sidechain-store", "version": 2}', "got sidechain-store version 2"),
            ('{"format": "sidechain-store", "version": 1}', "expected a manifest in"),
        ],
    )
    def test_manifest(self, make: Callable[..., Path], content: str, message: str) -> None:
        folder = make(units=1)
        (folder / "manifest.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            ActivationStore(folder)

    def test_totals_are_checked(self, make: Callable[..., Path]) -> None:
        path = make(units=1) / "manifest.json"
        text = path.read_text()
        changed = text.replace('"rows": 25,\n   "shards"', '"rows": 26, "shards"')
        assert changed != text
        path.write_text(changed)
        with pytest.raises(ValueError, match=r"expected 26 rows of cross:3 .*got 25 in its"):
            ActivationStore(path.parent)

    def test_prompts(self, tmp_path: Path) -> None:
        with ActivationWriter(tmp_path / "s", {"a": 2}) as writer:
            writer.set_prompts(["x"], [0])
        (path,) = (tmp_path / "s").glob("prompts-*")
        flip(path, 5)
        with pytest.raises(ValueError, match=f"CRC-32 .* of {path}"):
            ActivationStore(tmp_path / "s").prompts()

    def test_shards_without_a_manifest_are_not_overwritten(self, make: Callable[..., Path]) -> None:
        folder = make()
        (folder / "manifest.json").unlink()
        with pytest.raises(FileExistsError, match=r"expected manifest\.json beside the shards"):
            ActivationWriter(folder, {"cross:3": WIDTH}, mode="resume")
        assert (folder / VICTIM).exists()


def go_on(folder: Path, units: int = UNITS) -> None:
    storage = Storage(torch.float32, shard_bytes=9000)
    with ActivationWriter(folder, {"cross:3": WIDTH}, storage, mode="resume") as writer:
        for unit in range(writer.cursor, units):
            write_unit(writer, unit)


def check_and_continue(
    folder: Path, expected: Callable[..., Tensor], least: int = 0, units_in_all: int = UNITS
) -> None:
    store = verified(folder)
    units, rest = divmod(len(store), UNIT_ROWS)
    assert rest == 0 and units >= least
    assert torch.equal(store.read(range(len(store))), expected(units))
    go_on(folder, units_in_all)
    store = verified(folder)
    assert torch.equal(store.read(range(len(store))), expected(units_in_all))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(place)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        reason = done.stderr.strip()
    except OSError as error:
        reason = str(error)
    if reason:
        pytest.skip(f"cannot mount a small disk: {reason}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


class TestFullDisk:
    def test_real_one(self, small_disk: Path, expected: Callable[..., Tensor]) -> None:
        with pytest.raises(OSError, match=r"No space left.*rows of cross:3 are intact") as caught:
            go_on(small_disk / "s")
        assert caught.value.errno == errno.ENOSPC
        left = sorted(p.name for p in (small_disk / "s").rglob("*") if ".tmp" in p.name)
        assert not left
        subprocess.run(["mount", "-o", "remount,size=10m", str(small_disk)], check=True)
        check_and_continue(small_disk / "s", expected, least=12)

    def test_limit_of_the_process(self, tmp_path: Path, expected: Callable[..., Tensor]) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (7000, hard))
        try:
            with pytest.raises(OSError, match=r"File too large.*are intact"):
                go_on(tmp_path / "s")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        check_and_continue(tmp_path / "s", expected)

    @pytest.mark.parametrize("name", ["writev", "fsync", "replace"])
    def test_at_every_call(
        self,
        tmp_path: Path,
        expected: Callable[..., Tensor],
        monkeypatch: pytest.MonkeyPatch,
        name: str,
    ) -> None:
        inner = getattr(os, name)
        calls = 0

        def count(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            return inner(*args)

        with monkeypatch.context() as patched:
            patched.setattr(os, name, count)
            go_on(tmp_path / "whole", 12)
        for victim in range(1, calls + 1, max(1, calls // 6)):
            calls = 0

            def call(*args: Any, victim: int = victim) -> Any:
                nonlocal calls
                calls += 1
                if victim <= calls < victim + 5:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return inner(*args)

            folder = tmp_path / str(victim)
            with monkeypatch.context() as patched:
                patched.setattr(os, name, call)
                with pytest.raises(OSError, match="No space left"):
                    go_on(folder, 12)
            if (folder / "manifest.json").exists():
                check_and_continue(folder, expected, units_in_all=12)

    def test_a_disk_that_has_room_again_loses_only_the_open_unit(
        self, tmp_path: Path, expected: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder, inner, size = tmp_path / "s", os.writev, WIDTH * 4 * UNIT_ROWS

        def call(descriptor: int, parts: Any) -> int:
            content = b"".join(parts)
            room = 9 * size - os.fstat(descriptor).st_size  # the tail of seven units fits as well
            if len(content) > room:
                inner(descriptor, [content[: max(0, room)]])  # half of it is on disk already
                raise OSError(errno.ENOSPC, "No space left on device")
            return inner(descriptor, parts)

        monkeypatch.setattr(os, "writev", call)
        with (
            pytest.raises(OSError, match="No space left"),
            ActivationWriter(folder, {"cross:3": WIDTH}, Storage(torch.float32)) as writer,
        ):
            for unit in range(7):
                write_unit(writer, unit)
            with writer.transaction():
                for unit in range(30):
                    writer.write({"cross:3": rows_of(unit)})
        monkeypatch.undo()
        assert len(ActivationStore(folder)) == 7 * UNIT_ROWS
        check_and_continue(folder, expected)


def test_rows_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    for bad in (float("nan"), float("inf"), 1e6):
        folder = tmp_path / str(bad)
        rows = rows_of(0).clone()
        rows[3, 5] = bad
        with (
            pytest.raises(ValueError, match="expected finite rows in float16 at a"),
            ActivationWriter(folder, {"a": WIDTH}) as writer,
        ):
            writer.write({"a": rows_of(1)})
            writer.write({"a": rows})
        assert len(verified(folder)) == UNIT_ROWS
