# SPDX-License-Identifier: Apache-2.0
"""Arrays as rows: what is read, in which order, and that nothing is copied or let through."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sidechain.store import (
    ActivationStore,
    ActivationWriter,
    ArrayRows,
    Batches,
    BatchOptions,
    split,
)
from sidechain.store import arrays as module
from sidechain.store.shard import decode

D = 6


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def read(rows, numbers=None):
    numbers = np.arange(len(rows)) if numbers is None else np.asarray(numbers)
    stored = np.empty((len(numbers), rows.row_bytes), np.uint8)
    rows.gather(numbers, stored)
    return decode(torch.from_numpy(stored), rows.dtype, rows.width)


FORMS = {
    "tensor": lambda x: x,
    "array": lambda x: x.numpy(),
    "columns": lambda x: np.asfortranarray(x.numpy()),
    "transposed": lambda x: x.T.contiguous().T,
    "every other": lambda x: torch.stack([x, -x], 1).flatten(0, 1)[::2],
    "backwards": lambda x: x.numpy()[::-1].copy()[::-1],
    "wide": lambda x: torch.cat([x, x], 1)[:, :D],
    "3d": lambda x: x.reshape(10, 5, D),
    "3d turned": lambda x: x.reshape(5, 10, D).transpose(0, 1).contiguous().transpose(0, 1),
    "without the first of each": lambda x: torch.cat([x[:10].view(10, 1, D), x.view(10, 5, D)], 1)[
        :, 1:
    ],
    "4d, not even": lambda x: torch.cat([x.view(5, 5, 2, D)] * 2, 2).numpy()[:, :, :2],
    "4d, backwards": lambda x: x.view(5, 5, 2, D).numpy()[:, ::-1].copy()[:, ::-1],
    "the same row": lambda x: x.view(1, 50, 1, D),
    "parts": lambda x: [x[:7], x[7:7], x[7:].numpy()],
    "read only": lambda x: np.frombuffer(x.numpy().tobytes(), np.float32).reshape(-1, D),
    "float64": lambda x: x.double(),
    "mixed": lambda x: [x[:9].double(), x[9:]],
    "with gradient": lambda x: x.clone().requires_grad_(),
}


@pytest.mark.parametrize("form", FORMS)
def test_rows_in_any_form(form):
    x = draw(50, D)
    rows = ArrayRows(FORMS[form](x))
    assert len(rows) == 50 and rows.width == D and rows.dtype == torch.float32
    assert torch.equal(read(rows), x)
    numbers = [49, 0, 7, 7, 31]
    assert torch.equal(read(rows, numbers), x[numbers])
    assert not rows.has_steps and rows.labels([3, 1]).token.tolist() == [3, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_as_it_is(dtype):
    x = draw(50, D).to(dtype)
    for given in (x, x.T.contiguous().T, [x[:3], x[3:]]):
        rows = ArrayRows(given)
        assert rows.dtype == dtype and torch.equal(read(rows), x)
    both = ArrayRows([x, draw(4, D)])
    assert both.dtype == torch.float32 and torch.equal(read(both)[:50], x.float())


def test_a_mapped_file_is_not_copied(tmp_path, monkeypatch):
    np.save(tmp_path / "x.npy", draw(64, 8, D).numpy())
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    rows = ArrayRows([mapped, mapped])
    for part in rows._parts:
        assert np.shares_memory(part.values, mapped)
    sizes = []
    real = np.ascontiguousarray
    monkeypatch.setattr(np, "ascontiguousarray", lambda a: sizes.append(a.nbytes) or real(a))
    monkeypatch.setattr(module, "_BLOCK", 4096)
    assert rows.fingerprint and rows.statistics.total().count == 1024
    assert sizes and max(sizes) <= 4096


def test_statistics_are_exact_and_leave_bad_rows_out():
    x = draw(3000, D) * 3 + 1
    steps = torch.arange(3000) % 3
    rows = ArrayRows(x, steps=steps)
    for step in range(3):
        known = rows.statistics.total([step])
        torch.testing.assert_close(known.mean, x[steps == step].double().mean(0))
        torch.testing.assert_close(known.variance, x[steps == step].double().var(0, correction=0))
    assert rows.bad == (0, -1)
    spoilt = torch.cat([x, torch.full((2, D), torch.nan), torch.full((1, D), 1e25)])
    bad = ArrayRows([spoilt[:10], spoilt[10:]], steps=torch.cat([steps, torch.zeros(3).long()]))
    assert bad.bad == (3, 3000)
    torch.testing.assert_close(bad.statistics.total().mean, rows.statistics.total().mean)


def test_many_rows_are_sampled(monkeypatch):
    monkeypatch.setattr(module, "STATISTICS_ROWS", 100)
    x = torch.arange(10_000.0)[:, None].expand(-1, D)
    known = ArrayRows(x).statistics.total()
    assert known.count == 100 and float(known.mean[0]) == pytest.approx(4999.5, rel=1e-3)
    monkeypatch.setattr(module, "CHECKSUM_BYTES", 2 * module._SAMPLE)
    wide = torch.zeros(4, 1 << 19)  # 2 MiB a row
    rows = ArrayRows(wide)
    assert rows.fingerprint == ArrayRows(wide.clone()).fingerprint
    assert rows.fingerprint != ArrayRows(wide + 1).fingerprint


def test_a_fingerprint_sees_every_change():
    x, steps = draw(500, D), torch.arange(500)
    known = ArrayRows(x, steps=steps).fingerprint
    assert known == ArrayRows(x.numpy().copy(), steps=steps.tolist()).fingerprint
    for row in (0, 250, 499):
        other = x.clone()
        other[row, 2] += 1e-6
        assert ArrayRows(other, steps=steps).fingerprint != known
    assert ArrayRows(x, steps=steps + 1).fingerprint != known
    assert ArrayRows(x).fingerprint != known
    assert ArrayRows(x.double(), steps=steps).fingerprint != known


@pytest.mark.parametrize("shuffle", ["rows", "blocks", "off"])
def test_batches_take_them_as_a_store(shuffle):
    x, steps = draw(1000, D), torch.arange(1000) % 7
    options = BatchOptions(64, shuffle=shuffle, epochs=2, labels=True)
    batches = Batches(ArrayRows(x, steps=steps), options, target=ArrayRows(2 * x))
    found = list(batches)
    assert len(found) == 2 * (1000 // 64)
    for got in found:
        assert torch.equal(got.x, x[got.rows]) and torch.equal(got.target, 2 * x[got.rows])
        assert torch.equal(got.step, steps[got.rows])
    first = torch.cat([got.rows for got in found[: len(found) // 2]])
    assert len(first.unique()) == len(first)


def test_held_out_rows_are_others(tmp_path):
    x = draw(1000, D)
    with ActivationWriter(tmp_path / "s", {"a": D}) as writer:
        writer.write({"a": x}, step=0)
    for rows in (ArrayRows(x), ActivationStore(tmp_path / "s")):
        train, held = split(rows, 0.2, seed=3)
        assert (len(train), len(held)) == (800, 200)
        numbers = [part.numbers(np.arange(len(part))) for part in (train, held)]
        assert sorted(np.concatenate(numbers)) == list(range(1000))
        assert torch.equal(read(held).float(), read(rows, numbers[1]).float())
        assert train.labels([5]).token.tolist() == rows.labels(numbers[0][[5]]).token.tolist()
        assert train.statistics.total().count == 800
        assert train.fingerprint != held.fingerprint != split(rows, 0.2, seed=4)[1].fingerprint
    for share in (0.0, 1.0, 0.0001):
        with pytest.raises(ValueError, match="leaves rows on both sides"):
            split(ArrayRows(x), share)


def test_a_repeated_row_is_read_again():
    x = draw(1, D)
    rows = ArrayRows(x.view(1, 1, D).expand(4, 3, D))
    assert len(rows) == 12 and torch.equal(read(rows), x.expand(12, D))


def test_rows_at_uneven_distances_are_one_part():
    """`x[:, 1:]` of [B, T, d] was B parts, each of them looked at for every batch."""
    x = draw(2000, 3, D)
    rows, same = ArrayRows(x[:, 1:]), ArrayRows(x[:, 1:].reshape(-1, D))
    assert len(rows._parts) == 1 and torch.equal(read(rows), read(same))
    assert rows.fingerprint == same.fingerprint
    assert rows.bad == same.bad == (0, -1)
    # One axis more, of length 1, is no reason to leave the fast way.
    assert rows._plain is None and ArrayRows(x.numpy()[:, :1])._plain is None
    assert ArrayRows(x.numpy().reshape(-1, D)[:, None])._plain is not None


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("numbers", [[-1], [3], [0, 2, 7]])
def test_numbers_outside_are_refused(order, numbers):
    """-1 would be the last row, and rows past a part those of the other one."""
    x = np.array(draw(3, D).numpy(), order=order)
    rows = ArrayRows(x)
    part, _ = split(ArrayRows(np.concatenate([x, x])), 0.5)
    out = np.empty((len(numbers), rows.row_bytes), np.uint8)
    for reader in (rows, part):
        with pytest.raises(IndexError, match=r"rows within \[0, 3\)"):
            reader.gather(np.array(numbers), out)
        with pytest.raises(IndexError, match=r"rows within \[0, 3\)"):
            reader.labels(np.array(numbers))


@pytest.mark.parametrize("share", [0.0, 1.0, 0.01, -1, float("nan"), "half", None])
def test_a_share_that_leaves_nothing(share):
    with pytest.raises(ValueError, match="share that leaves rows on both sides of 9"):
        split(ArrayRows(draw(9, D)), share)


@pytest.mark.parametrize(
    ("arrays", "steps", "error", "message"),
    [
        (5, None, TypeError, "expected tensors or arrays .*got int"),
        ([[1.0, 2.0]], None, TypeError, "got list"),
        ([], None, ValueError, "at least one row"),
        (torch.zeros(0, D), None, ValueError, "at least one row"),
        (torch.zeros(3, 0), None, ValueError, "one width"),
        (torch.zeros(3), None, ValueError, r"expected \[\.\.\., d\]"),
        (np.float32(3), None, TypeError, "got float32"),
        ([torch.zeros(3, D), torch.zeros(3, 2)], None, ValueError, r"one width .*got \[2, 6\]"),
        (torch.zeros(3, D).int(), None, TypeError, "got int32"),
        (np.zeros((3, D), np.int64), None, TypeError, "got int64"),
        (np.zeros((3, D), bool), None, TypeError, "got bool"),
        (np.zeros((3, D), object), None, TypeError, "got object"),
        (np.zeros((3, D), np.complex64), None, TypeError, "got complex64"),
        (np.zeros((3, D), ">f4"), None, TypeError, "byte order"),
        (np.ma.masked_less(np.zeros((3, D)), 1), None, TypeError, "without a mask"),
        (torch.eye(D).to_sparse(), None, TypeError, "dense tensor .*got torch.sparse_coo"),
        (torch.zeros(3, D, device="meta"), None, TypeError, "got a tensor without data"),
        (torch.zeros(3, D), [1, 2], ValueError, "expected 3 steps"),
        (torch.zeros(3, D), [1.0, 2.0, 3.0], TypeError, "whole steps"),
        (torch.zeros(3, D), [1, 2, -1], ValueError, "steps >= 0"),
    ],
)
def test_refused(arrays, steps, error, message):
    with pytest.raises(error, match=message):
        ArrayRows(arrays, steps=steps)
