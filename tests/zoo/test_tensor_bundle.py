# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest

from sidechain.zoo.music.musicnn import music_tagger
from sidechain.zoo.recipes.convert_musicnn import convert, find_checkpoint
from sidechain.zoo.recipes.tensor_bundle import MAGIC, read_bundle, read_table


def varint(value):
    out = b""
    while value >= 0x80:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def field(number, value):
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    return varint(number << 3) + varint(value)


def block(pairs, *, compression=0):
    """Entries with shared prefixes, one restart point, a type byte and a checksum nobody reads."""
    out, last = b"", b""
    for key, value in pairs:
        shared = 0
        while shared < min(len(key), len(last)) and key[shared] == last[shared]:
            shared += 1
        out += varint(shared) + varint(len(key) - shared) + varint(len(value))
        out += key[shared:] + value
        last = key
    out += (0).to_bytes(4, "little") + (1).to_bytes(4, "little")
    return out, bytes([compression]) + b"\0\0\0\0"


def table(*groups, compression=0):
    """A LevelDB table with one data block per group of pairs."""
    out, index = b"", []
    for pairs in groups:
        body, trailer = block(pairs, compression=compression)
        index.append((pairs[-1][0], varint(len(out)) + varint(len(body))))
        out += body + trailer
    handles = b""
    for pairs in ([], index):  # meta index, index
        body, trailer = block(pairs)
        handles += varint(len(out)) + varint(len(body))
        out += body + trailer
    return out + handles.ljust(40, b"\0") + MAGIC.to_bytes(8, "little")


def entry(array, offset, *, shard=0, dtype=1, size=None):
    shape = b"".join(field(2, field(1, count)) for count in array.shape)
    return (
        field(1, dtype)
        + field(2, shape)
        + field(3, shard)
        + field(4, offset)
        + field(5, array.nbytes if size is None else size)
        + varint(6 << 3 | 5)  # checksum, fixed 32 bits
        + b"abcd"
    )


KERNEL = np.arange(600, dtype=np.float32).reshape(2, 300)
BIAS = np.array([1.5, -2.0], np.float32)
POWER = np.array(0.25, np.float32)


def write(folder, index, shards=2):
    (folder / "m.index").write_bytes(index)
    blobs = [KERNEL.tobytes(), b"pad!" + BIAS.tobytes() + POWER.tobytes()][:shards]
    for number, blob in enumerate(blobs):
        (folder / f"m.data-{number:05d}-of-{shards:05d}").write_bytes(blob)
    return folder / "m"


def whole_index(**options):
    return table(
        [(b"", field(1, 2)), (b"conv2d/bias", entry(BIAS, 4, shard=1))],
        [(b"conv2d/kernel", entry(KERNEL, 0)), (b"power", entry(POWER, 12, shard=1))],
        **options,
    )


def test_reads_a_hand_made_bundle(tmp_path):
    found = read_bundle(write(tmp_path, whole_index()))
    assert list(found) == ["conv2d/bias", "conv2d/kernel", "power"]
    for name, expected in [("conv2d/bias", BIAS), ("conv2d/kernel", KERNEL), ("power", POWER)]:
        assert found[name].dtype == np.float32 and found[name].shape == expected.shape
        np.testing.assert_array_equal(found[name], expected)


def test_keys_with_shared_prefixes():
    keys = [b"a", b"ab", b"abc" * 60, b"abd"]
    assert list(read_table(table([(key, key[::-1]) for key in keys]))) == [
        (key, key[::-1]) for key in keys
    ]


@pytest.mark.parametrize(
    ("index", "error", "match"),
    [
        (b"short", ValueError, "expected a LevelDB table"),
        (whole_index()[:-1] + b"\0", ValueError, "expected a LevelDB table"),
        (whole_index()[200:], ValueError, "expected a"),
        (whole_index(compression=1), NotImplementedError, "uncompressed blocks, got compression 1"),
        (table([(b"x", entry(BIAS, 4))]), ValueError, "expected a header"),
        (table([(b"", field(1, 2) + field(2, 1))]), NotImplementedError, "got big-endian"),
        (
            table([(b"", field(1, 2)), (b"x", entry(BIAS, 4, dtype=2))]),
            NotImplementedError,
            "expected x in float32",
        ),
        (
            table([(b"", field(1, 2)), (b"x", entry(BIAS, 4, size=4))]),
            ValueError,
            "expected 8 bytes of x",
        ),
        (
            table([(b"", field(1, 2)), (b"x", entry(BIAS, 2399))]),
            ValueError,
            "expected 8 bytes of x",
        ),
    ],
)
def test_bad_bundles(tmp_path, index, error, match):
    with pytest.raises(error, match=match):
        read_bundle(write(tmp_path, index))


def test_missing_shard(tmp_path):
    prefix = write(tmp_path, whole_index())
    (tmp_path / "m.data-00001-of-00002").unlink()
    with pytest.raises(FileNotFoundError, match="00001-of-00002"):
        read_bundle(prefix)


def test_shipped_weights_are_the_checkpoint_in_float16():
    try:
        prefix = find_checkpoint()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    variables = read_bundle(prefix)
    assert variables["conv2d_1/kernel"].shape == (7, 67, 1, 204)
    shipped = music_tagger().state_dict()
    converted = convert(variables)
    assert set(shipped) == set(converted)
    for name, value in converted.items():
        np.testing.assert_array_equal(shipped[name], value.half().float(), err_msg=name)
