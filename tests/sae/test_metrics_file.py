# SPDX-License-Identifier: Apache-2.0
"""The metrics file: strict JSON and one line a step, whatever happens to it."""

from __future__ import annotations

import errno
import json
import math
import os
import warnings

import pytest
import torch

from sidechain.sae import train
from sidechain.sae.training.metrics_file import MetricsFile


def strict(path):
    """The steps of a file in which every line is strict JSON."""

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    data = path.read_bytes()
    assert b"\0" not in data and (not data or data.endswith(b"\n"))
    rows = [json.loads(line, parse_constant=refuse) for line in data.splitlines()]
    return [row["step"] for row in rows]


def lines(*steps):
    return b"".join(json.dumps({"step": s, "fvu": 1 / s}).encode() + b"\n" for s in steps)


def opened(path, done, length=0):
    """Open and close a file; return how often it warned."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        MetricsFile(path, done, length).close()
    return len(found)


BEFORE = lines(2, 4, 6)


@pytest.mark.parametrize(
    ("data", "kept", "warned"),
    [
        (BEFORE, [2, 4, 6], 0),
        (BEFORE + lines(8, 10), [2, 4, 6], 0),
        (BEFORE + b'{"step": 8, "fv', [2, 4, 6], 0),
        (BEFORE + b"\0" * 40, [2, 4, 6], 0),
        (None, [], 1),
        (b"", [], 1),
        (lines(2, 4), [2, 4], 1),
        (BEFORE[:-5], [2, 4], 1),
        (BEFORE[5:], [4, 6], 1),
        (BEFORE[:-1], [2, 4, 6], 0),
        (lines(2, 4, 4, 6), [2, 4, 6], 0),
        (lines(2, 4, 6, 2, 4, 6), [2, 4, 6], 0),
        (b"notes\n" + BEFORE, [2, 4, 6], 0),
        (b"[]\n3\nnull\n{}\n" + BEFORE, [2, 4, 6], 0),
        (b'{"step": "2"}\n{"step": true}\n' + BEFORE, [2, 4, 6], 0),
        (b"[" * 50_000 + b"\n\xff\xfe\n" + BEFORE, [2, 4, 6], 0),
        (BEFORE.replace(b"\n", b"\r\n"), [2, 4, 6], 0),
    ],
    ids=[
        "whole", "after the checkpoint", "half a line", "zeros", "removed", "emptied", "shortened",
        "cut in a line", "begins in a line", "no last newline", "a line twice", "all twice",
        "a note", "other JSON", "other steps", "no JSON", "carriage returns",
    ],
)  # fmt: skip
def test_what_is_found_at_a_checkpoint(tmp_path, data, kept, warned):
    path = tmp_path / "metrics.jsonl"
    if data is not None:
        path.write_bytes(data)
    assert opened(path, 6, len(BEFORE)) == warned
    assert strict(path) == kept
    again = MetricsFile(path, 6, 0)
    again.write({"step": 8})
    again.close()
    assert strict(path) == [*kept, 8]


def test_numbers_that_are_not_finite_become_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "fvu": NaN}\n{"step": 2, "fvu": -Infinity, "l0": 1e999}\n')
    file = MetricsFile(path, 2, path.stat().st_size)
    file.write({"step": 3, "fvu": math.nan, "l0": math.inf, "dead": 0.5})
    file.close()
    assert strict(path) == [1, 2, 3]
    last = json.loads(path.read_text().splitlines()[-1])
    assert last == {"step": 3, "fvu": None, "l0": None, "dead": 0.5}


@pytest.mark.parametrize("how", ["removed", "emptied", "cut", "replaced", "appended", "as it was"])
def test_a_file_that_changes_under_a_run(tmp_path, how):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0)
    for step in (2, 4):
        file.write({"step": step})
    if how == "removed":
        path.unlink()
    elif how == "emptied":
        os.truncate(path, 0)
    elif how == "cut":
        os.truncate(path, file.length - 3)
    elif how == "replaced":  # as an editor saves
        other = tmp_path / "other"
        other.write_bytes(path.read_bytes())
        os.replace(other, path)
    elif how == "appended":
        path.write_bytes(path.read_bytes() + b"a note without an end")
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        file.write({"step": 6})
        file.write({"step": 8})
    file.close()
    kept = {"removed": [], "emptied": [], "cut": [2]}.get(how, [2, 4])
    assert strict(path) == [*kept, 6, 8]
    assert len(found) == (kept != [2, 4])


@pytest.mark.parametrize("written", [0, 1, 9])
def test_a_full_disk_leaves_whole_lines(tmp_path, written, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0)
    file.write({"step": 2})
    real, calls = os.write, []

    def write(descriptor, data):
        if descriptor != file._descriptor:
            return real(descriptor, data)
        calls.append(1)
        if written and len(calls) == 1:
            return real(descriptor, bytes(data)[:written])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        with pytest.raises(OSError, match=r"No space left on device: '.*metrics\.jsonl'"):
            file.write({"step": 4})
    assert strict(path) == [2]
    file.write({"step": 4})
    file.close()
    assert strict(path) == [2, 4]


def test_short_writes_are_completed(tmp_path, monkeypatch):
    file, real = MetricsFile(tmp_path / "m", 0), os.write
    monkeypatch.setattr(os, "write", lambda d, data: real(d, bytes(data)[:3]))
    file.write({"step": 2, "fvu": 0.25})
    file.close()
    assert strict(tmp_path / "m") == [2]
    assert file.length == (tmp_path / "m").stat().st_size


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(OSError, match=r"metrics\.jsonl"):
        MetricsFile(tmp_path / "metrics.jsonl", 0)


def test_a_run_whose_metrics_were_removed_goes_on(tmp_path, monkeypatch):
    rows = [torch.randn(2048, 6, generator=torch.Generator().manual_seed(3))]
    settings = dict(
        features=16, k=2, tokens=64 * 12, batch=64, log_every=2, progress=False,
        checkpoint_minutes=0.0,
    )  # fmt: skip
    whole = train(rows, tmp_path / "whole", **settings)
    from sidechain.sae.training.step import train_step as real

    def cut(state, batch):
        if state.step == 7:
            raise InterruptedError
        return real(state, batch)

    with monkeypatch.context() as patch:
        patch.setattr("sidechain.sae.training.trainer.train_step", cut)
        with pytest.raises(InterruptedError):
            train(rows, tmp_path / "cut", **settings)
    path = tmp_path / "cut" / "metrics.jsonl"
    assert strict(path) == [2, 4, 6]
    path.unlink()
    with pytest.warns(RuntimeWarning, match="lines of these steps are missing") as found:
        again = train(rows, tmp_path / "cut", **settings)
    assert len(found) == 1
    assert strict(path) == [8, 10, 12]
    assert torch.equal(whole.w_dec, again.w_dec)
