# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are damaged or another run's: left out with one warning, never a traceback."""

from __future__ import annotations

import json
import warnings
import zlib

import pytest
import torch
from safetensors.torch import load_file, save_file

from sidechain.sae import Normaliser, SaeConfig, TrainConfig, train
from sidechain.sae.training import checkpoint
from sidechain.sae.training.state import TrainState

D, F = 6, 16
CONFIG = SaeConfig(D, F, "batch_topk", k=2)
ODD = [
    None, True, False, -1, 0, 1, 7, 3.5, 10**30, float("nan"), float("inf"), "", "x", "../x", [],
    [None], [[]], {}, {"step": 4}, ["features-00000-of-00001.safetensors"],
]  # fmt: skip


def state(step, fill=0.5):
    made = TrainState(CONFIG, TrainConfig(tokens=640, batch=64), Normaliser.identity(D))
    made.step = step
    for tensor in made.weights.values():
        tensor.fill_(fill)
    return made


@pytest.fixture
def two(tmp_path):
    """Checkpoints of steps 2 and 4."""
    for step in (2, 4):
        checkpoint.save(tmp_path, state(step), {"config": CONFIG.to_json(), "metrics_bytes": 0})
    return tmp_path


def manifest_of(folder):
    return folder / "step-000000004" / "manifest.json"


def used(folder):
    """The step that a run goes on from, with its tensors read, and the number of warnings."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        got = checkpoint.latest(folder, CONFIG.to_json())
    assert all("left out: " in str(w.message) for w in found)
    assert all("\n" not in str(w.message) for w in found)
    if got is None:
        return 0, len(found)
    other = state(0, fill=0.0)
    checkpoint.normalisers(got)
    checkpoint.load(got, other)
    assert got.metrics_bytes >= 0 and other.step == got.step
    assert float(other.weights["w_enc"].min()) == 0.5
    return got.step, len(found)


def places(value, path=()):
    """Every place in JSON values, as a path of keys."""
    yield path
    inside = value.items() if isinstance(value, dict) else ()
    for key, one in enumerate(value) if isinstance(value, list) else inside:
        yield from places(one, (*path, key))


def replaced(value, path, new):
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(copy[path[0]], path[1:], new)
    return copy


def without(value, path):
    copy = dict(value) if isinstance(value, dict) else list(value)
    if len(path) == 1:
        del copy[path[0]]
    else:
        copy[path[0]] = without(copy[path[0]], path[1:])
    return copy


def matters(path):
    """Fields that a run reads; what else is in the manifest is for people."""
    first = path[0] if path else ""
    return first in ("", "format", "version", "step", "files", "dead_total")


def test_every_field_replaced_by_odd_values(two):
    text = manifest_of(two).read_text()
    whole = json.loads(text)
    assert used(two) == (4, 0)
    tried = 0
    for path in places(whole):
        for new in ODD:
            changed = replaced(whole, path, new)
            if changed == whole and type(new) is not bool:
                continue
            manifest_of(two).write_text(json.dumps(changed))
            step, said = used(two)
            harmless = path == ("dead_total",) and type(new) is int and 0 <= new <= F
            expected = (2, 1) if matters(path) and not harmless else None
            assert (step, said) == expected or (expected is None and (step, said) in OK), (
                path,
                new,
            )
            tried += 1
    assert tried > 500


#: Both are right where a field does not decide what is loaded.
OK = ((4, 0), (2, 1))


def test_every_field_missing(two):
    whole = json.loads(manifest_of(two).read_text())
    for path in places(whole):
        if not path:
            continue
        manifest_of(two).write_text(json.dumps(without(whole, path)))
        assert used(two) == ((2, 1) if matters(path) else (4, 0)), path


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"null", b"\xff\xfe", b"[" * 100_000, b"1" * 10_000, b'{"format": NaN}', b"{}"],
    ids=["empty", "cut", "null", "bytes", "deep", "long", "nan", "no fields"],
)
def test_a_manifest_that_is_none(two, data):
    manifest_of(two).write_bytes(data)
    assert used(two) == (2, 1)


def rewrite(folder, change):
    """Change the tensors of step 4 and sign them as if a run had written them."""
    path = folder / "step-000000004" / "features-00000-of-00001.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    content = json.loads(manifest_of(folder).read_text())
    data = path.read_bytes()
    content["files"][0] |= {"bytes": len(data), "crc32": zlib.crc32(data)}
    manifest_of(folder).write_text(json.dumps(content))


NAMES = ("w_enc", "w_dec", "b_enc", "b_dec", "last_fired", "dead", "normaliser.mean")


@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_that_is_missing(two, name):
    rewrite(two, lambda tensors: tensors.pop(name))
    assert used(two) == (2, 1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["w_enc", "b_dec", "w_dec.square", "normaliser.scale"])
def test_a_tensor_that_is_not_finite(two, name, bad):
    rewrite(two, lambda tensors: tensors[name].view(-1)[-1:].fill_(bad))
    assert used(two) == (2, 1)


def test_a_threshold_that_is_not_trained_is_none_of_these(two):
    rewrite(two, lambda tensors: tensors["threshold"].fill_(float("nan")))
    got = checkpoint.latest(two, CONFIG.to_json())
    assert got.step == 4


@pytest.mark.parametrize("name", ["w_enc", "last_fired", "dead"])
def test_a_tensor_of_fewer_features(two, name):
    rewrite(two, lambda tensors: tensors.update({name: tensors[name][1:].clone()}))
    assert used(two) == (2, 1)


def test_a_file_outside_of_the_folder(two):
    """Whole and signed, and yet not of this checkpoint."""
    path = two / "step-000000004" / "features-00000-of-00001.safetensors"
    path.rename(two / path.name)
    content = json.loads(manifest_of(two).read_text())
    for name in (f"../{path.name}", str(two / path.name)):
        content["files"][0]["file"] = name
        manifest_of(two).write_text(json.dumps(content))
        assert used(two) == (2, 1)


def test_features_that_no_file_has(two):
    content = json.loads(manifest_of(two).read_text())
    content["files"][0] |= {"first": 1, "stop": F + 1}
    manifest_of(two).write_text(json.dumps(content))
    assert used(two) == (2, 1)


def test_no_tensors_at_all(two):
    path = two / "step-000000004" / "features-00000-of-00001.safetensors"
    path.write_bytes(b"not a safetensors file")
    rewrite_sum = json.loads(manifest_of(two).read_text())
    rewrite_sum["files"][0] |= {"bytes": 22, "crc32": zlib.crc32(path.read_bytes())}
    manifest_of(two).write_text(json.dumps(rewrite_sum))
    assert used(two) == (2, 1)


def test_one_of_another_dictionary(two):
    content = json.loads(manifest_of(two).read_text())
    content["config"]["features"] = 2 * F
    manifest_of(two).write_text(json.dumps(content))
    with pytest.warns(RuntimeWarning, match=r"left out: expected features=16 \[this run\], got 32"):
        assert checkpoint.latest(two, CONFIG.to_json()).step == 2


def test_another_k_is_the_same_run(two):
    assert checkpoint.latest(two, {**CONFIG.to_json(), "k": 9}).step == 4


def test_damaged_ones_of_later_steps_do_not_crowd_out_good_ones(two):
    manifest_of(two).write_text("{}")
    assert used(two) == (2, 1)
    checkpoint.save(two, state(3), {})
    assert sorted(p.name for p in two.iterdir()) == ["step-000000002", "step-000000003"]
    assert used(two) == (3, 0)


def test_steps_of_ten_digits(tmp_path):
    for step in (999_999_999, 1_000_000_000):
        checkpoint.save(tmp_path, state(step), {})
    assert used(tmp_path) == (1_000_000_000, 0)


def test_a_run_goes_on_from_the_one_before(tmp_path):
    rows = [torch.randn(2048, D, generator=torch.Generator().manual_seed(3))]
    settings = dict(
        features=F, k=2, tokens=64 * 20, batch=64, log_every=2, progress=False,
        checkpoint_minutes=0.0,
    )  # fmt: skip
    whole = train(rows, tmp_path / "whole", **settings)
    out = tmp_path / "cut"
    train(rows, out, **settings)
    (out / "sae.safetensors").unlink()
    last = max((out / "checkpoints").iterdir())
    (last / "manifest.json").write_text('{"files": []}')
    with pytest.warns(RuntimeWarning, match=f"{last.name} left out"):
        again = train(rows, out, **settings)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"config": []}', "[" * 99999])
def test_a_damaged_record_of_a_run_is_one_line(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match=r"run\.json: expected .*, got ") as found:
        train([torch.randn(256, D)], tmp_path, features=F, k=2, tokens=128, batch=64)
    assert "\n" not in str(found.value)[:200] and len(str(found.value)) < 300
