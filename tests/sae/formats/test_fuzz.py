# SPDX-License-Identifier: Apache-2.0
"""Configs and weights of any shape: one true line, or the right dictionary; never a traceback."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sae.formats.support import D, F, K, draw
from sidechain._errors import is_bad_input
from sidechain.sae import ARCHITECTURES, Normaliser, Provenance, Sae, SaeConfig, formats

#: What a reader may answer a file with that it cannot use.
ANSWERS = (ValueError, NotImplementedError, FileNotFoundError)
ODD = [
    None, True, False, 0, 1, -3, 2, 2.5, 1e99, math.nan, math.inf, 10**400, "", "abc", "3", "topk",
    "relu", "tanh-relu", "none", [], [1, 2], {}, {"k": 3}, {"k": "x"}, [[]], "\u0000\n", K, D, F,
]  # fmt: skip


def dictionary(architecture):
    k = K if ARCHITECTURES[architecture].takes("k") else None
    sae = Sae(SaeConfig(D, F, architecture, k=k), provenance=Provenance(site="mid")).eval()
    with torch.no_grad():
        for index, (name, tensor) in enumerate(sorted(sae.weights().items())):
            if name == "threshold":
                tensor.fill_(0.4)
            elif name != "w_dec":
                tensor.copy_(draw(*tensor.shape, seed=index))
    return sae


CASES = [
    (name, architecture)
    for name in formats.FORMATS[1:]
    for architecture in ARCHITECTURES
    if name in ARCHITECTURES[architecture].formats
]
FILES = {"saelens": "sae_weights.safetensors", "dictionary_learning": "ae.pt"}


def config_of(name):
    return "config.json" if name == "dictionary_learning" else "cfg.json"


def same(found, right):
    """The same map: weights, widths and what chooses the features."""
    shape = ("d_in", "width_out", "features", "architecture", "k", "transcoder")
    ours, theirs = found.config, right.config
    known = all(getattr(ours, name) == getattr(theirs, name) for name in shape)
    tensors = found.weights() | {"b_pre": found.b_pre}
    wanted = right.weights() | {"b_pre": right.b_pre}
    return known and all(torch.equal(tensors[name], wanted[name]) for name in wanted)


def answer(read, right, what):
    """Whether a mutated file was refused, in one line; otherwise it must give the dictionary."""
    try:
        found = read()
    except ANSWERS as error:
        text = str(error)
        assert "\n" not in text and ": expected " in text, f"{what}: {text!r}"
        assert is_bad_input(error), f"{what}: {text!r}"  # the command line shows one line
        return True
    assert same(found, right), f"{what}: read as another dictionary"
    return False


#: Settings of which other values mean another dictionary, and one that the file can hold.
FLAGS = {"apply_b_dec_to_input", "rescale_acts_by_decoder_norm", "transcode", "transcoder"}


def means_another(read, right, where, odd):
    """Whether a value is a right one for another dictionary, which then has to come out."""
    if not where or where[-1] not in FLAGS | {"k"}:
        return False
    if type(odd) is bool and where[-1] in FLAGS:
        return True
    if where[-1] != "k" or right.config.k is None or type(odd) is not int or not 1 <= odd <= F:
        return False
    found = read()
    assert found.config.k in (odd, right.config.k)  # that of the weights goes first
    found.config = replace(found.config, k=right.config.k)
    assert same(found, right)
    return True


def paths(value, here=()):
    """Yield where the values of a JSON object are, to any depth."""
    yield here
    if isinstance(value, dict):
        for key in value:
            yield from paths(value[key], (*here, key))


def put(value, where, new):
    if not where:
        return new
    changed = copy.deepcopy(value)
    inner = changed
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = new
    return changed


def drop(value, where):
    changed = copy.deepcopy(value)
    inner = changed
    for key in where[:-1]:
        inner = inner[key]
    del inner[where[-1]]
    return changed


#: Keys that are read but not written here, by format.
MORE = {
    "sparsify": {"signed": False, "sample_topk": False},
    "tada": {"signed": False, "skip_connection": False, "transcode": False, "activation": "topk"},
    "saelens": {
        "activation_fn": "relu",
        "activation_fn_str": "relu",
        "activation_fn_kwargs": {},
        "finetuning_scaling_factor": False,
    },
    "dictionary_learning": {},
}


@pytest.mark.parametrize(("name", "architecture"), CASES)
def test_a_config_of_any_shape(tmp_path, name, architecture):
    folder = tmp_path / "sae"
    formats.save(dictionary(architecture), folder, name)
    path = folder / config_of(name)
    config = json.loads(path.read_text()) | MORE[name]
    right = formats.load(folder)
    path.write_text(json.dumps(config))
    assert not answer(lambda: formats.load(folder), right, "as it is")
    refused = tried = 0
    for where in paths(config):
        for odd in ODD:
            path.write_text(json.dumps(put(config, where, odd)))
            for format in ("auto", name):  # named, where its kind is not to be seen any more
                what = f"{'.'.join(where)}={odd!r} as {format}"
                read = partial(formats.load, folder, format)
                if not means_another(read, right, where, odd):
                    refused += answer(read, right, what)
                    tried += 1
        if where:
            path.write_text(json.dumps(drop(config, where)))
            answer(lambda: formats.load(folder, name), right, f"without {'.'.join(where)}")
    assert 0 < refused < tried
    for text in ("", "{", "nul", "[" * 100_000, '{"k": 3, "k"', "\ufeff{}"):
        path.write_text(text)
        assert answer(lambda: formats.load(folder, name), right, repr(text[:20]))
    path.write_bytes(b'{"k": "\xff"}')
    assert answer(lambda: formats.load(folder, name), right, "no UTF-8")


def other_weights(tensor):
    """Yield (what, tensor, whether it is always wrong) that a damaged file may hold."""
    yield "integer", tensor.to(torch.int64), tensor.is_floating_point()
    yield "boolean", tensor > 0, True
    yield "complex", tensor.to(torch.complex64), True
    yield "empty", tensor.new_zeros(0), True
    yield "empty matrix", tensor.new_zeros(0, D), True
    yield "more dimensions", tensor[None], True
    if tensor.dim():
        yield "scalar", tensor.new_ones(()), True
    yield "longer", torch.cat([tensor.reshape(-1)] * 2), True
    if tensor.is_floating_point():
        for bad in (math.nan, math.inf, -math.inf):
            damaged = tensor.clone()
            damaged.reshape(-1)[-1] = bad
            yield str(bad), damaged, True
        yield "too large", tensor.double() * 1e300, bool(tensor.any())
        yield "float64", tensor.double(), False
    if tensor.dim() == 2:
        yield "transposed", tensor.T.contiguous(), True
    if tensor.dim():
        yield "a row less", tensor[1:].clone(), True


def rewritten(path, tensors):
    if path.suffix == ".pt":
        torch.save(tensors, path)
    else:
        save_file({name: t.contiguous() for name, t in tensors.items()}, path)


@pytest.mark.parametrize(("name", "architecture"), CASES)
def test_weights_of_any_shape(tmp_path, name, architecture):
    folder = tmp_path / "sae"
    formats.save(dictionary(architecture), folder, name)
    path = folder / FILES.get(name, "sae.safetensors")
    tensors = torch.load(path) if path.suffix == ".pt" else load_file(path)
    right = formats.load(folder)
    # Not read by topk of dictionary_learning: its encode does not use it.
    ignored = {"threshold"} if name == "dictionary_learning" and architecture == "topk" else set()
    for key, tensor in tensors.items():
        if key in ignored:
            continue
        for what, other, wrong in other_weights(tensor):
            rewritten(path, tensors | {key: other})
            refused = answer(lambda: formats.load(folder), right, f"{key}: {what}")
            assert refused or not wrong, f"{key}: {what} was not refused"
        rewritten(path, {n: t for n, t in tensors.items() if n != key})
        lacking = answer(lambda: formats.load(folder), right, f"without {key}")
        assert lacking or key == "k", key  # k stands in the config too
    rewritten(path, tensors | {"more": torch.ones(1)})
    assert answer(lambda: formats.load(folder), right, "one more")


@pytest.mark.parametrize(
    "content",
    [
        {"a": 1},
        [torch.ones(2)],
        {1: torch.ones(2)},
        torch.ones(2),
        {"encoder.weight": torch.ones(2, 2).to_sparse()},
        {"encoder.weight": torch.ones(F, D, device="meta")},
        {},
        None,
    ],
    ids=str,
)
def test_pickles_of_any_shape(tmp_path, content):
    (tmp_path / "sae").mkdir()
    torch.save(content, tmp_path / "sae" / "ae.pt")
    assert answer(lambda: formats.load(tmp_path / "sae"), None, content)


@pytest.mark.parametrize("name", ["saelens", "dictionary_learning"])
def test_files_cut_or_changed_anywhere(tmp_path, name):
    folder = tmp_path / "sae"
    formats.save(dictionary("topk"), folder, name)
    path = folder / FILES[name]
    whole, right = path.read_bytes(), formats.load(folder)
    for place in range(0, len(whole), max(1, len(whole) // 60)):
        path.write_bytes(whole[:place])
        assert answer(lambda: formats.load(folder), right, f"cut at {place}")
        changed = bytearray(whole)
        changed[place] ^= 0x55
        path.write_bytes(bytes(changed))
        try:
            formats.load(folder)  # a bit of a weight makes another dictionary: no error to expect
        except ANSWERS as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_own_files_of_any_shape(tmp_path, architecture):
    grid = Normaliser(draw(2, D), torch.ones(2), torch.tensor([0, 3]), torch.tensor([9.0, 1.0]))
    sae = dictionary(architecture)
    sae.normaliser = sae.target_normaliser = grid
    path = tmp_path / "sae.safetensors"
    sae.save(path)
    right = Sae.load(path)
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["sidechain"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def write(tensors, header):
        text = header if isinstance(header, str) else json.dumps(header)
        save_file(tensors, path, {"sidechain": text})

    free = {"unit_norm", "tied_bias", "prefixes"}
    refused = 0
    for where in paths(header):
        for odd in ODD:
            if where and where[-1] in free and type(odd) is bool:
                continue  # another training of the same map
            write(tensors, put(header, where, odd))
            if means_another(lambda: Sae.load(path), right, where, odd):
                continue
            refused += answer(lambda: Sae.load(path), right, f"{where}={odd!r}")
        if where:
            write(tensors, drop(header, where))
            answer(lambda: Sae.load(path), right, f"without {where}")
    assert refused > 100
    for text in ("", "[", "[" * 100_000, "3"):
        write(tensors, text)
        assert answer(lambda: Sae.load(path), right, text[:9])
    running = {"threshold"} if ARCHITECTURES[architecture].threshold == "batch" else set()
    for key, tensor in tensors.items():
        for what, other, wrong in other_weights(tensor):
            if what == "nan" and key in running:
                continue  # not trained yet
            write({n: t.contiguous() for n, t in (tensors | {key: other}).items()}, header)
            was = answer(lambda: Sae.load(path), right, f"{key}: {what}")
            assert was or not wrong or what == "too large", f"{key}: {what} was not refused"
        write({n: t for n, t in tensors.items() if n != key}, header)
        lacking = answer(lambda: Sae.load(path), right, f"without {key}")
        assert lacking or key == "normaliser.timesteps"
