# SPDX-License-Identifier: Apache-2.0
"""Rows of other programs written into a store: the same rows, all of them or nothing."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

from sidechain import sae
from sidechain._errors import InputError
from sidechain.io.lock import Lock
from sidechain.store import ActivationStore, ArrayRows, Storage, import_rows, importing, split
from sidechain.store.manifest import MANIFEST
from sidechain.store.transaction import Appender

D = 6
X = torch.randn(100, D, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of 8 float32 rows, and a commit after each."""
    monkeypatch.setattr(importing, "_BLOCK", 8 * 4 * D)
    monkeypatch.setattr(importing, "Storage", lambda dtype: Storage(dtype, shard_bytes=1))


def load(source, out, **options):
    return import_rows(source, out, progress=False, **options)


def left(folder):
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_and_their_order_are_kept(tmp_path, dtype):
    x = X.to(dtype)
    steps = torch.arange(100) % 7
    store = load(x, tmp_path / "acts", steps=steps)
    assert store.dtype == dtype and store.has_steps
    assert torch.equal(store.read(range(100)), x)
    labels = store.labels(range(100))
    assert torch.equal(labels.step, steps)
    assert torch.equal(labels.token, torch.arange(100))
    assert bool((labels.prompt == -1).all())
    store.verify()
    assert left(tmp_path) == ["acts"]


def test_files_and_another_dtype(tmp_path):
    np.save(tmp_path / "x.npy", X.double().numpy())
    out = tmp_path / "acts"
    store = load(tmp_path / "x.npy", out, dtype=torch.float16, site="mlp/3")
    assert torch.equal(store.read(range(100)), X.half())
    assert store.site == "mlp/3" and not store.has_steps
    assert ActivationStore(out).provenance["name"] == "x.npy"


def test_a_part_keeps_the_numbers_of_the_whole(tmp_path):
    _, held = split(ArrayRows(X), 0.2, seed=3)
    store = load(held, tmp_path / "acts")
    numbers = store.labels(range(20)).token
    assert torch.equal(numbers, torch.from_numpy(held.numbers(np.arange(20))))
    assert torch.equal(store.read(range(20)), X[numbers])


def test_bad_rows_are_refused_or_left_out(tmp_path):
    x = X.clone()
    x[33, 2], x[90, 0] = float("nan"), 3e20  # the square of the second is infinite
    with pytest.raises(InputError, match="got row 33"):
        load(x, tmp_path / "acts")
    assert left(tmp_path) == []
    store = load(x, tmp_path / "acts", on_bad_rows="skip")
    good = [n for n in range(100) if n not in (33, 90)]
    assert torch.equal(store.read(range(98)), X[good])
    assert store.labels(range(98)).token.tolist() == good
    assert ActivationStore(tmp_path / "acts").provenance["skipped"] == 2


@pytest.mark.parametrize("policy", ["error", "skip"])
def test_overflow_of_float16_names_its_row_before_anything_is_written(tmp_path, policy):
    x = X.clone()
    x[71, 1] = -70000.0
    with pytest.raises(InputError, match=r"65504 \[float16\], got 70000 in row 71: choose bf"):
        load(x, tmp_path / "acts", dtype=torch.float16, on_bad_rows=policy)
    assert left(tmp_path) == []
    assert len(load(x, tmp_path / "acts", dtype=torch.bfloat16)) == 100


def cut(monkeypatch, after, error):
    """Let the commits after some fail."""
    real, calls = Appender.commit, []

    def commit(self):
        calls.append(0)
        if len(calls) > after:
            raise error
        real(self)

    monkeypatch.setattr(Appender, "commit", commit)
    return lambda: monkeypatch.setattr(Appender, "commit", real)


def test_a_full_disk_is_one_line_and_the_same_import_goes_on(tmp_path, monkeypatch, capsys):
    out = tmp_path / "acts"
    mend = cut(monkeypatch, 3, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(OSError, match=r"No space left on device; \d+ rows are kept, the same"):
        load(X, out)
    assert left(tmp_path) == [".acts.import"]
    kept = len(ActivationStore(tmp_path / ".acts.import"))
    assert 0 < kept < 100
    mend()
    import_rows(X, out)
    assert f"import: goes on at row {kept} of 100" in capsys.readouterr().err
    store = ActivationStore(out)
    assert torch.equal(store.read(range(100)), X)
    assert store.statistics.total().count == 100
    assert left(tmp_path) == ["acts"]


def test_other_rows_or_settings_start_anew(tmp_path, monkeypatch, capsys):
    mend = cut(monkeypatch, 3, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(OSError):
        load(X, tmp_path / "acts")
    mend()
    import_rows(2 * X, tmp_path / "acts")
    assert "import: starts anew, the one that was cut off had fingerprint=" in (
        capsys.readouterr().err
    )
    assert torch.equal(ActivationStore(tmp_path / "acts").read(range(100)), 2 * X)


KILLED = """
    import os, signal, sys, numpy as np
    from sidechain.store import Storage, importing
    from sidechain.store.transaction import Appender
    importing._BLOCK = 8 * 4 * 6
    importing.Storage = lambda dtype: Storage(dtype, shard_bytes=1)
    real, calls = Appender.commit, []
    def commit(self):
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        calls.append(0)
        real(self)
    Appender.commit = commit
    importing.import_rows(sys.argv[1], sys.argv[2], progress=False)
"""


def test_killed_in_the_middle(tmp_path):
    np.save(tmp_path / "x.npy", X.numpy())
    words = [str(tmp_path / "x.npy"), str(tmp_path / "acts")]
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(KILLED), *words], check=False)
    assert run.returncode == -signal.SIGKILL
    assert not (tmp_path / "acts").exists()
    store = load(*words)
    assert torch.equal(store.read(range(100)), X)
    store.verify()
    assert left(tmp_path) == ["acts", "x.npy"]


def test_killed_before_the_rename(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            load(X, tmp_path / "acts")
    assert torch.equal(load(X, tmp_path / "acts").read(range(100)), X)


def test_rows_that_change_meanwhile(tmp_path):
    x = X.clone()
    rows, looks = ArrayRows(x), []
    real = rows.gather

    def gather(numbers, out):
        looks.append(0)
        if len(looks) == 20:  # of 13 blocks, looked at and then written
            x[80] += 1.0
        real(numbers, out)

    rows.gather = gather
    with pytest.raises(RuntimeError, match=r"expected rows that stay as they are, got .* row 80"):
        load(rows, tmp_path / "acts")
    assert not (tmp_path / "acts").exists()


def test_two_at_once(tmp_path):
    folder = tmp_path / ".acts.import"
    folder.mkdir()
    with Lock(folder / ".lock", "held"), pytest.raises(RuntimeError, match="only writer"):
        load(X, tmp_path / "acts")
    assert torch.equal(load(X, tmp_path / "acts").read(range(100)), X)


def test_what_is_there_stays(tmp_path):
    load(X, tmp_path / "acts")
    with pytest.raises(FileExistsError, match="without a store as out, got the store"):
        load(2 * X, tmp_path / "acts")
    assert torch.equal(ActivationStore(tmp_path / "acts").read(range(100)), X)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").touch()
    with pytest.raises(FileExistsError, match="expected an empty folder as out"):
        load(X, tmp_path / "full")
    with pytest.raises(FileExistsError, match="expected a folder as out, got the file"):
        load(X, tmp_path / "full" / "notes")
    (tmp_path / "empty").mkdir()
    assert len(load(X, tmp_path / "empty")) == 100


@pytest.mark.parametrize(
    ("source", "options", "kind", "match"),
    [
        (X, {"on_bad_rows": "drop"}, ValueError, "on_bad_rows to be one of error, skip, got 'drop"),
        (X, {"dtype": torch.int8}, TypeError, "dtype float32 .* got torch.int8"),
        (X, {"column": "x"}, TypeError, "no column with rows in memory, got 'x'"),
        (X, {"steps": torch.arange(99)}, ValueError, r"expected 100 steps .*, got 99"),
        (X, {"steps": torch.full((100,), 70000)}, InputError, "step <= 65535 .*, got 70000 at"),
        (ArrayRows(X), {"steps": torch.arange(100)}, TypeError, "expected no steps with a reader"),
        (X.long(), {}, TypeError, "expected float16, bfloat16, float32 or float64"),
        (X / 0, {"on_bad_rows": "skip"}, InputError, "a row that is finite, got 100 that are not"),
        ({"x": X}, {}, TypeError, "got dict"),
        ("nowhere.npy", {}, FileNotFoundError, "got nothing at nowhere.npy"),
    ],
)
def test_bad_input(tmp_path, source, options, kind, match):
    with pytest.raises(kind, match=match):
        load(source, tmp_path / "acts", **options)
    assert left(tmp_path) == []


def test_a_store_needs_no_import(tmp_path):
    store = load(X, tmp_path / "acts")
    for source in (store, tmp_path / "acts"):
        with pytest.raises(InputError, match="of another program, got the store"):
            load(source, tmp_path / "again")
    assert (tmp_path / "acts" / MANIFEST).is_file()


@pytest.mark.parametrize("steps", [None, torch.arange(512) % 2])
def test_it_trains_as_the_rows_do(tmp_path, steps):
    x = torch.randn(512, D, generator=torch.Generator().manual_seed(1)) + 3.0
    options = {"features": 12, "k": 2, "tokens": 512, "batch": 64, "progress": False}
    one = sae.train(x, tmp_path / "one", steps=steps, **options)
    store = load(x, tmp_path / "acts", steps=steps)
    two = sae.train(store, tmp_path / "two", **options)
    torch.testing.assert_close(two.w_dec, one.w_dec)
    torch.testing.assert_close(two.normaliser.mean, one.normaliser.mean)
    for found in (one, two):
        assert (found.normaliser.steps is None) == (steps is None)
