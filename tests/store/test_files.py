# SPDX-License-Identifier: Apache-2.0
"""Files of other programs as rows."""

from __future__ import annotations

import importlib.util
import mmap
import pickle
import warnings
from typing import ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sidechain._errors import InputError, is_bad_input
from sidechain.store import open_rows
from sidechain.store.shard import decode

D = 6
X = torch.randn(40, D, generator=torch.Generator().manual_seed(0))
arrow_there = pytest.mark.skipif(
    importlib.util.find_spec("pyarrow") is None, reason="pyarrow is not installed"
)


def read(rows):
    stored = np.empty((len(rows), rows.row_bytes), np.uint8)
    rows.gather(np.arange(len(rows)), stored)
    return decode(torch.from_numpy(stored), rows.dtype, rows.width)


def is_mapped(values):
    while isinstance(values, np.ndarray) and not isinstance(values, np.memmap):
        values = values.base
    return isinstance(values, np.memmap | mmap.mmap)


def lists(x, kind):
    import pyarrow as pa

    flat = pa.array(x.numpy().reshape(-1))
    if kind == "fixed":
        return pa.FixedSizeListArray.from_arrays(flat, x.shape[1])
    offsets = pa.array(np.arange(0, x.numel() + 1, x.shape[1], dtype=np.int32))
    return pa.ListArray.from_arrays(offsets, flat)


def table(x, kind="fixed", **more):
    import pyarrow as pa

    return pa.table({"acts": lists(x, kind), **more})


def write_arrow(path, content, *, stream=False):
    import pyarrow as pa

    kind = pa.ipc.new_stream if stream else pa.ipc.new_file
    with kind(str(path), content.schema) as writer:
        writer.write_table(content, max_chunksize=17)


def test_numpy(tmp_path):
    np.save(tmp_path / "x.npy", X.numpy())
    rows = open_rows(tmp_path / "x.npy")
    assert torch.equal(read(rows), X) and rows.name == "x.npy"
    assert is_mapped(rows._parts[0].values)
    with pytest.raises(InputError, match="expected no column"):
        open_rows(tmp_path / "x.npy", column="a")


def test_torch(tmp_path):
    torch.save(X.half(), tmp_path / "x.pt")
    assert torch.equal(read(open_rows(tmp_path / "x.pt")), X.half())
    torch.save([X, X], tmp_path / "two.pth")
    assert len(open_rows(tmp_path / "two.pth")) == 80
    torch.save({"a": X, "b": 2 * X, "note": "text"}, tmp_path / "named.pt")
    assert torch.equal(read(open_rows(tmp_path / "named.pt", column="b")), 2 * X)
    with pytest.raises(InputError, match=r"expected column to be one of a, b .*got none"):
        open_rows(tmp_path / "named.pt")
    torch.save({0: X, 1: 2 * X}, tmp_path / "numbered.pt")
    assert torch.equal(read(open_rows(tmp_path / "numbered.pt", column="1")), 2 * X)
    torch.save(X.bfloat16(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(read(open_rows(tmp_path / "old.pt")), X.bfloat16())


def test_safetensors(tmp_path):
    save_file({"a": X, "b": X.bfloat16()}, tmp_path / "x.safetensors")
    assert torch.equal(read(open_rows(tmp_path / "x.safetensors", column="b")), X.bfloat16())
    with pytest.raises(InputError, match=r"expected column to be one of a, b .*got 'c'"):
        open_rows(tmp_path / "x.safetensors", column="c")


@arrow_there
@pytest.mark.parametrize("kind", ["fixed", "lists"])
@pytest.mark.parametrize("stream", [False, True])
def test_arrow(tmp_path, kind, stream):
    content = table(X, kind, prompt=[f"p{n}" for n in range(40)])
    write_arrow(tmp_path / "x.arrow", content, stream=stream)
    assert torch.equal(read(open_rows(tmp_path / "x.arrow")), X)
    with pytest.raises(InputError, match=r"expected lists of floats in prompt of .*got string"):
        open_rows(tmp_path / "x.arrow", column="prompt")


@arrow_there
def test_parquet(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(table(X, "lists", n=list(range(40))), tmp_path / "x.parquet")
    assert torch.equal(read(open_rows(tmp_path / "x.parquet")), X)
    assert torch.equal(read(open_rows(tmp_path / "x.parquet", column="acts")), X)
    columns = {f"c{n}": X[:, n].numpy() for n in range(D)}
    parquet.write_table(pa.table(columns), tmp_path / "columns.parquet")
    assert torch.equal(read(open_rows(tmp_path / "columns.parquet")), X)
    parquet.write_table(pa.table({**columns, "name": ["x"] * 40}), tmp_path / "mixed.parquet")
    with pytest.raises(InputError, match="float columns alone"):
        open_rows(tmp_path / "mixed.parquet")
    parquet.write_table(pa.table({"a": [1.0, 2.0], "b": [3.0, None]}), tmp_path / "hole.parquet")
    with pytest.raises(InputError, match=r"missing values in .*hole\.parquet, got some in b"):
        open_rows(tmp_path / "hole.parquet")


@arrow_there
def test_what_lists_may_not_be(tmp_path):
    import pyarrow as pa

    cases = {
        "ragged": (pa.array([[1.0, 2.0], [3.0]]), "lists of one length .*got 1 to 2"),
        "missing": (pa.array([[1.0, 2.0], None]), "missing"),
        "hole": (pa.array([[1.0, 2.0], [None, 1.0]]), "missing"),
        "whole": (pa.array([[1, 2], [3, 4]]), "got int64"),
    }
    for name, (values, message) in cases.items():
        write_arrow(tmp_path / f"{name}.arrow", pa.table({"a": values}))
        with pytest.raises((InputError, TypeError), match=message):
            open_rows(tmp_path / f"{name}.arrow")


@arrow_there
def test_a_dataset(tmp_path):
    """As `datasets.Dataset` keeps it: an arrow table, and the order of a selection beside it."""

    class Dataset:
        def __init__(self, content, indices=None):
            self.data = type("Table", (), {"table": content})()
            self._indices = indices

        def flatten_indices(self):
            return Dataset(self.data.table.take(self._indices))

    assert torch.equal(read(open_rows(Dataset(table(X)))), X)
    chosen = [5, 3, 9]
    assert torch.equal(read(open_rows(Dataset(table(X), chosen))), X[chosen])


@arrow_there
def test_what_is_no_dataset():
    """Several datasets, a stream and an array have attributes of a dataset, but no table."""

    class Splits(dict):
        column_names: ClassVar = {"train": ["acts"]}
        data = property(dict)

    class Stream:
        column_names = None

    with pytest.raises(InputError, match=r"one dataset, got Splits of train, test: choose one"):
        open_rows(Splits(train=1, test=2))

    class Changed:
        data = table(X)
        _format_type = "custom"

    with pytest.raises(InputError, match="dataset without a transform"):
        open_rows(Changed())
    for other in (Stream(), X, X.numpy(), {"a": X}, None):
        with pytest.raises(TypeError, match=f"path or a datasets.Dataset.*{type(other).__name__}"):
            open_rows(other)


def test_files_that_are_left_out_are_named(tmp_path):
    np.save(tmp_path / "a.npy", X.numpy())
    (tmp_path / "state.json").write_text("{}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(open_rows(tmp_path)) == len(X)
    np.savez(tmp_path / "b.npz", X.numpy())
    with pytest.warns(RuntimeWarning, match=r"1 files of .* are not read \[not \.npy\]: b\.npz"):
        assert len(open_rows(tmp_path)) == len(X)


def test_folders_in_natural_order(tmp_path):
    for number in (10, 9, 1):
        np.save(tmp_path / f"part{number}.npy", (X + number).numpy())
    expected = torch.cat([X + 1, X + 9, X + 10])
    (tmp_path / "notes.txt").write_text("what these are")
    (tmp_path / ".hidden").write_text("")
    assert torch.equal(read(open_rows(tmp_path)), expected)
    (tmp_path / "deeper").mkdir()
    with pytest.raises(InputError, match="without folders in it, got deeper"):
        open_rows(tmp_path)
    (tmp_path / "deeper").rmdir()
    torch.save(X, tmp_path / "x.pt")
    with pytest.raises(InputError, match=r"files of one of .*got \.npy, \.pt"):
        open_rows(tmp_path)


def test_nothing_to_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="got nothing at"):
        open_rows(tmp_path / "none.npy")
    with pytest.raises(InputError, match="an empty one"):
        open_rows(tmp_path)
    (tmp_path / "x.csv").write_text("1,2")
    with pytest.raises(InputError, match=r"expected a file of \.npy.*got .*x\.csv"):
        open_rows(tmp_path / "x.csv")
    with pytest.raises(InputError, match=r"got x\.csv in"):
        open_rows(tmp_path)


@pytest.mark.parametrize("suffix", [".npy", ".pt", ".safetensors", ".arrow", ".parquet"])
@pytest.mark.parametrize(
    "content", [b"", b"nonsense, but long enough to be a header of sorts", b"\x93NUMPY"]
)
def test_damaged_files_are_named(tmp_path, suffix, content):
    if suffix in (".arrow", ".parquet") and importlib.util.find_spec("pyarrow") is None:
        pytest.skip("pyarrow is not installed")
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"x{suffix}") as caught:
        open_rows(path)
    assert "\n" not in str(caught.value)


def test_a_file_cut_short(tmp_path):
    np.save(tmp_path / "x.npy", X.numpy())
    torch.save(X, tmp_path / "x.pt")
    save_file({"x": X}, tmp_path / "x.safetensors")
    for name in ("x.npy", "x.pt", "x.safetensors"):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(InputError, match=name):
            open_rows(path)


def written(kind, folder):
    """A file of a kind with the rows X."""
    path = folder / f"good.{'arrow' if kind in ('lists', 'columns', 'stream') else kind}"
    if kind == "npy":
        np.save(path, X.numpy())
    elif kind == "pt":
        torch.save({"a": X}, path)
    elif kind == "pth":
        torch.save({"a": X}, path, _use_new_zipfile_serialization=False)
    elif kind == "safetensors":
        save_file({"a": X}, path)
    elif kind == "parquet":
        from pyarrow import parquet

        parquet.write_table(table(X, "list"), path)
    else:
        content = table(X, "fixed" if kind == "arrow" else "list")
        if kind == "columns":
            content = type(content).from_pydict({f"c{n}": X[:, n].numpy() for n in range(D)})
        write_arrow(path, content, stream=kind == "stream")
    return path


@pytest.mark.parametrize(
    "kind",
    ["npy", "pt", "pth", "safetensors", "arrow", "lists", "columns", "stream", "parquet"],
)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_bytes_that_changed_end_in_one_line(tmp_path, kind):
    """Whatever a parser makes of a damaged file; followed unchecked, offsets ended the process."""
    if kind in ("arrow", "lists", "columns", "stream", "parquet"):
        pytest.importorskip("pyarrow")
    good = written(kind, tmp_path).read_bytes()
    random = np.random.default_rng(0)
    refused = 0
    for number in range(150):
        damaged = bytearray(good)
        # Anywhere, in the header, or in the footer.
        low, high = [(0, len(good)), (0, 600), (len(good) - 900, len(good))][number % 3]
        for place in random.integers(max(0, low), min(high, len(good)), 3):
            damaged[place] = random.integers(256)
        if number % 7 == 6:
            del damaged[random.integers(len(good)) :]
        path = (tmp_path / f"x{number}").with_suffix(f".{kind}")
        path = path if kind not in ("lists", "columns", "stream") else path.with_suffix(".arrow")
        path.write_bytes(damaged)
        try:
            assert open_rows(path).fingerprint >= 0
        except (TypeError, ValueError) as error:
            refused += 1
            assert is_bad_input(error) and "\n" not in str(error)
            assert path.name in str(error)
        path.unlink()
    assert 0 < refused < 150  # or the damage says nothing


def test_pickles_that_run_code_are_not_opened(tmp_path):
    ran = tmp_path / "ran"

    class Trap:
        def __reduce__(self):
            return (open, (str(ran), "w"))

    torch.save(Trap(), tmp_path / "x.pt")
    np.save(tmp_path / "x.npy", np.array([Trap()]), allow_pickle=True)
    (tmp_path / "y.pt").write_bytes(pickle.dumps(Trap()))
    for name in ("x.pt", "x.npy", "y.pt"):
        with pytest.raises(InputError, match=name):
            open_rows(tmp_path / name)
    assert not ran.exists()
