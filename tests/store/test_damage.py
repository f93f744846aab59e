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

from sidechain.store import ActivationStore, ActivationWriter

from .conftest import UNIT_ROWS, UNITS, WIDTH, rows_of, write_unit

ROWS = UNITS * UNIT_ROWS
VICTIM = "cross-3/00002.rows"


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def sizes(store: ActivationStore) -> list[int]:
    return [shard.shard.rows for shard in store._shards]


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (lambda p: os.truncate(p, p.stat().st_size - 1), "expected .* bytes, got"),
    "torn": (lambda p: os.truncate(p, 100), "expected .* bytes, got 100"),
    "empty": (lambda p: os.truncate(p, 0), "expected .* bytes, got 0"),
    "longer": (lambda p: os.truncate(p, p.stat().st_size + 1), "expected .* bytes, got"),
    "missing": (lambda p: p.unlink(), "No such file"),
    "flipped label": (lambda p: flip(p, p.stat().st_size - 30), "of its labels"),
    "flipped checksum": (lambda p: flip(p, p.stat().st_size - 1), "of its labels"),
}


class TestShards:
    @pytest.mark.parametrize("kind", DAMAGE)
    def test_is_named_and_left_out(
        self, make: Callable[..., Path], expected: Callable[..., Tensor], kind: str
    ) -> None:
        folder = make()
        counts = sizes(ActivationStore(folder))
        harm, reason = DAMAGE[kind]
        harm(folder / VICTIM)
        with pytest.warns(RuntimeWarning, match=f"damaged in .*{VICTIM}.*{reason}.*left out"):
            store = ActivationStore(folder)
        with pytest.raises(ValueError, match=VICTIM):
            ActivationStore(folder, damaged="error")
        assert [d.file for d in store.damaged] == [VICTIM]
        start = sum(counts[:2])
        everything = expected()
        wanted = torch.cat([everything[:start], everything[start + counts[2] :]])
        assert torch.equal(store.read(range(len(store))), wanted)
        seen = torch.cat([b.x for b in store.batches(64, drop_last=False)])
        assert len(seen) == len(wanted)

    def test_every_flipped_bit_of_the_rows_is_found(self, make: Callable[..., Path]) -> None:
        folder = make(units=6)
        path = folder / "cross-3/00000.rows"
        whole = path.read_bytes()
        size = WIDTH * 4 * ActivationStore(folder)._shards[0].shard.rows
        for offset in range(0, size, 997):
            flip(path, offset)
            with pytest.warns(RuntimeWarning, match="cross-3/00000.rows rows"):
                store = ActivationStore(folder, verify="full")
            (damage,) = store.damaged
            assert damage.start <= offset // (WIDTH * 4) < damage.stop
            path.write_bytes(whole)
        assert not ActivationStore(folder).verify()

    def test_only_the_block_of_a_flipped_bit_is_left_out(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rows = torch.randn(1000, 64)
        with ActivationWriter(tmp_path / "s", {"a": 64}, dtype=torch.float32) as writer:
            writer._transaction.manifest.block_bytes = 64 * 4 * 100
            for part in rows.split(33):
                writer.write({"a": part})
        store = ActivationStore(tmp_path / "s", verify="full")
        assert len(store) == 1000
        flip(tmp_path / "s/a/00000.rows", 64 * 4 * 250)
        assert len(ActivationStore(tmp_path / "s")) == 1000  # sizes and labels are right
        with pytest.warns(RuntimeWarning, match="rows 200 to 299"):
            store = ActivationStore(tmp_path / "s", verify="full")
        wanted = torch.cat([rows[:200], rows[300:]])
        assert torch.equal(store.read(range(900)), wanted)
        assert store.labels([200]).token.item() == 300 % 33

    def test_other_sites_are_untouched(self, make: Callable[..., Path]) -> None:
        folder = make(sites=("cross:3", "b"))
        (folder / VICTIM).unlink()
        assert len(ActivationStore(folder, "b", damaged="error")) == ROWS


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
            for cell, moments in before.cells.items():
                assert after.cells[cell].count == moments.count
                np.testing.assert_allclose(after.cells[cell].m2, moments.m2, rtol=1e-10)

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
        changed = text.replace('"rows": 25,\n   "dropped"', '"rows": 26, "dropped"')
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


def fill(folder: Path, units: int = UNITS) -> None:
    with ActivationWriter(
        folder, {"cross:3": WIDTH}, dtype=torch.float32, mode="resume", shard_bytes=9000
    ) as writer:
        for unit in range(writer.cursor, units):
            write_unit(writer, unit)


def check_and_continue(
    folder: Path, expected: Callable[..., Tensor], least: int = 0, units_in_all: int = UNITS
) -> None:
    store = ActivationStore(folder, verify="full", damaged="error")
    units, rest = divmod(len(store), UNIT_ROWS)
    assert rest == 0 and units >= least
    assert torch.equal(store.read(range(len(store))), expected(units))
    fill(folder, units_in_all)
    store = ActivationStore(folder, verify="full", damaged="error")
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
            fill(small_disk / "s")
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
                fill(tmp_path / "s")
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
            fill(tmp_path / "whole", 12)
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
                    fill(folder, 12)
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
            ActivationWriter(folder, {"cross:3": WIDTH}, dtype=torch.float32) as writer,
        ):
            for unit in range(7):
                write_unit(writer, unit)
            with writer.unit():
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
        assert len(ActivationStore(folder, verify="full", damaged="error")) == UNIT_ROWS
