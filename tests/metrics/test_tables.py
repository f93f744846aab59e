# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import io
import math

import pytest

from sidechain.metrics.tables import read_table, write_table


def read(tmp_path, text, **kwargs):
    path = tmp_path / "table.csv"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_table(path, text=("name",), **{"numbers": ("value",), **kwargs})


def test_reads_named_columns_in_any_order(tmp_path):
    rows = read(tmp_path, "\ufeffextra, value,name\n1,2.5, a \n\n2,-1e3,b\n")
    assert rows == [{"name": "a", "value": 2.5}, {"name": "b", "value": -1000.0}]


def test_blank_numbers_are_undefined(tmp_path):
    rows = read(tmp_path, "name,value\na,\nb,-\nc,3\n", numbers=(), blank_numbers=("value",))
    assert math.isnan(rows[0]["value"])
    assert math.isnan(rows[1]["value"])
    assert rows[2]["value"] == 3.0


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "got an empty file"),
        ("name,score\na,1\n", "got name,score .without value."),
        ("name,value,value\na,1,2\n", "twice value"),
        ("name,value\n", "at least one data line"),
        ("name,value\na,1\nb\n", "expected 2 cells on line 3"),
        ("name,value\na,x\n", "finite number in column value on line 2 .*, got 'x'"),
        ("name,value\na,nan\n", "got 'nan'"),
        ("name,value\na,inf\n", "got 'inf'"),
        ("name,value\n,1\n", "expected text in column name on line 2"),
        (b"name,value\n\xff\xfe,1\n", "UTF-8"),
    ],
)
def test_bad_tables(tmp_path, text, match):
    with pytest.raises(ValueError, match=match):
        read(tmp_path, text)


def test_missing_file(tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        read_table(tmp_path / "nowhere.csv", text=("name",))


def test_write():
    stream = io.StringIO()
    rows = [{"a": 1 / 3, "b": True, "c": "x,y"}, {"a": math.nan, "b": False, "c": 4}]
    write_table(stream, ("a", "b", "c"), rows)
    assert stream.getvalue() == 'a,b,c\n0.333333,true,"x,y"\n,false,4\n'
