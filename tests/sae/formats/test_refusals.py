# SPDX-License-Identifier: Apache-2.0
"""Folding of step normalisation, and what is refused: unsafe, damaged or inexpressible files."""

import json
import os
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae.formats.support import D, F, K, dense_codes, draw
from sidechain.sae import Normaliser, Sae, SaeConfig, formats


def dictionary(architecture="topk", **changes):
    selecting = architecture in ("topk", "batch_topk", "matryoshka")
    sae = Sae(SaeConfig(D, F, architecture, k=K if selecting else None, **changes)).eval()
    with torch.no_grad():
        for index, tensor in enumerate([sae.w_enc, sae.b_enc, sae.b_dec]):
            tensor.copy_(draw(*tensor.shape, seed=20 + index))
        if sae.threshold is not None:
            sae.threshold.fill_(0.4)
    return sae


@pytest.mark.parametrize("name", formats.FORMATS[1:])
def test_normalisation_of_a_step_is_folded(tmp_path, name):
    normaliser = Normaliser(
        draw(2, D, seed=30), torch.tensor([0.5, 3.0]), torch.tensor([0, 7]), torch.tensor([9.0, 2])
    )
    sae = dictionary()
    sae.normaliser = sae.target_normaliser = normaliser
    with pytest.raises(ValueError, match="expected a step of"):
        formats.save(sae, tmp_path / "none", name)
    assert not (tmp_path / "none").exists()
    formats.save(sae, tmp_path / "sae", name, step=7)
    x = draw(50, D, seed=31).double()
    y = (x - normaliser.mean[1].double()) / 3.0
    wide = sae.double()
    z = (y - wide.b_dec) @ wide.w_enc.T + wide.b_enc
    top = z.topk(K, dim=1)
    codes = torch.zeros_like(z).scatter(1, top.indices, top.values.clamp(min=0))
    expected = (codes @ wide.w_dec + wide.b_dec) * 3.0 + normaliser.mean[1].double()
    found = formats.load(tmp_path / "sae").double()
    mine = dense_codes(found, x)
    torch.testing.assert_close(mine, codes * 3.0, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mine @ found.w_dec + found.b_dec, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", formats.FORMATS[1:])
def test_a_bias_of_the_input_is_folded(tmp_path, name):
    sae = dictionary(tied_bias=False)
    sae.b_pre = draw(D, seed=40)
    formats.save(sae, tmp_path / "sae", name)
    found, wide = formats.load(tmp_path / "sae").double(), sae.double()
    x = draw(50, D, seed=41).double()
    torch.testing.assert_close(
        found.preactivations(x), wide.preactivations(x), rtol=1e-5, atol=1e-5
    )


class Payload:
    """A pickle of it makes a folder when opened carelessly."""

    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return os.mkdir, (self.place,)


def test_a_pickle_with_code_is_refused_with_the_way_out(tmp_path):
    folder, victim = tmp_path / "sae", str(tmp_path / "made-by-the-file")
    folder.mkdir()
    torch.save({"encoder.weight": Payload(victim)}, folder / "ae.pt")
    with pytest.raises(ValueError, match=r"refused.*torch\.save\(module\.state_dict\(\), path\)"):
        formats.load(folder)
    assert not os.path.exists(victim)
    (folder / "ae.pt").write_bytes(pickle.dumps(Payload(victim)))
    with pytest.raises(ValueError, match="formats: expected"):
        formats.load(folder)
    assert not os.path.exists(victim)


def test_damage_is_named(tmp_path):
    formats.save(dictionary(), tmp_path / "sae", "sparsify")
    weights = tmp_path / "sae" / "sae.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"intact safetensors file, got .*sae\.safetensors"):
        formats.load(tmp_path / "sae")
    formats.save(dictionary(), tmp_path / "pt", "dictionary_learning")
    pickled = tmp_path / "pt" / "ae.pt"
    pickled.write_bytes(pickled.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"expected an intact \.pt file"):
        formats.load(tmp_path / "pt")


def edited(folder, weights, config=None, drop=None, add=None):
    if config is not None:
        known = json.loads((folder / "cfg.json").read_text())
        (folder / "cfg.json").write_text(json.dumps(known | config))
    tensors = load_file(folder / weights)
    tensors = {k: t.clone() for k, t in tensors.items() if k != drop} | (add or {})
    save_file(tensors, folder / weights)


@pytest.mark.parametrize(
    "name, change, error, message",
    [
        ("sparsify", {"config": {"skip_connection": True}}, NotImplementedError, "skip_connection"),
        ("sparsify", {"config": {"activation": "groupmax"}}, NotImplementedError, "groupmax"),
        ("tada", {"config": {"input_unit_norm": True}}, NotImplementedError, "input_unit_norm"),
        ("tada", {"config": {"sample_topk": True}}, NotImplementedError, "sample_topk"),
        ("sparsify", {"drop": "b_dec"}, ValueError, "expected a tensor b_dec"),
        ("sparsify", {"add": {"W_skip": torch.zeros(D, D)}}, ValueError, "no further tensors"),
        ("sparsify", {"config": {"k": F + 1}}, ValueError, "expected 1 <= k"),
        ("sparsify", {"add": {"b_dec": torch.zeros(D + 1)}}, ValueError, "b_dec of shape"),
        ("saelens", {"config": {"architecture": "temporal"}}, NotImplementedError, "'temporal'"),
        ("saelens", {"config": {"k": 2.5}}, ValueError, "k as a whole number"),
        (
            "saelens",
            {"config": {"normalize_activations": "layer_norm"}},
            NotImplementedError,
            "every token by itself",
        ),
        (
            "saelens",
            {"config": {"normalize_activations": "expected_average_only_in"}},
            NotImplementedError,
            "fold it first",
        ),
    ],
)
def test_what_cannot_be_represented_is_refused(tmp_path, name, change, error, message):
    weights = "sae_weights.safetensors" if name == "saelens" else "sae.safetensors"
    formats.save(dictionary(), tmp_path / "sae", name)
    edited(tmp_path / "sae", weights, **change)
    with pytest.raises(error, match=message):
        formats.load(tmp_path / "sae")


@pytest.mark.parametrize(
    "name, sae, message",
    [
        ("sparsify", dictionary("jumprelu"), "expected an architecture of topk"),
        ("tada", dictionary(transcoder=True), "expected an autoencoder"),
        ("sparsify", dictionary(d_out=D + 1, transcoder=True), "d_out == d_in"),
        ("saelens", dictionary("topk", transcoder=True), "jumprelu transcoder"),
        ("dictionary_learning", dictionary(transcoder=True), "expected an autoencoder"),
    ],
)
def test_what_a_format_does_not_have_is_not_written(tmp_path, name, sae, message):
    with pytest.raises(NotImplementedError, match=message):
        formats.save(sae, tmp_path / "sae", name)
    assert not (tmp_path / "sae").exists()


def test_a_dictionary_learning_file_without_its_class(tmp_path):
    formats.save(dictionary("batch_topk"), tmp_path / "sae", "dictionary_learning")
    (tmp_path / "sae" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json beside ae\.pt"):
        formats.load(tmp_path / "sae")


def test_an_unknown_place_or_format(tmp_path):
    with pytest.raises(FileNotFoundError, match="got nothing at"):
        formats.load(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match=r"files of one of sidechain, .* got \['notes.txt'\]"):
        formats.load(tmp_path)
    with pytest.raises(ValueError, match="expected format to be one of"):
        formats.load(tmp_path, "onnx")
