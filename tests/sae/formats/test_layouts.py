# SPDX-License-Identifier: Apache-2.0
"""Files written here by hand, as each library writes them, against its own formulas in float64."""

import json

import pytest
import torch
from safetensors.torch import save_file

from sae.formats.support import D, F, K, N, dense_codes, draw, keep_top, pieces, unit
from sidechain.sae import formats


def agrees(folder, name, codes, x_hat, x):
    """Load, compare with the library's formula; also after a round trip through every format."""
    assert formats.detect(folder) == name
    sae = formats.load(folder)
    check(sae, codes, x_hat, x)
    again = folder.parent / "again"
    formats.save(sae, again, name)
    check(formats.load(again), codes, x_hat, x)
    formats.save(sae, folder.parent / "own.safetensors")
    check(formats.load(folder.parent / "own.safetensors"), codes, x_hat, x)
    return sae


def check(sae, codes, x_hat, x):
    sae = sae.double()
    found = dense_codes(sae, x.double())
    assert int((codes > 0).sum()) > N // 2  # otherwise nothing is compared
    torch.testing.assert_close(found, codes, rtol=1e-6, atol=1e-6)  # float32 weights
    torch.testing.assert_close(found @ sae.w_dec + sae.b_dec, x_hat, rtol=1e-6, atol=1e-6)


def write(folder, config, tensors, weights):
    folder.mkdir()
    (folder / "cfg.json").write_text(json.dumps(config))
    save_file({k: t.contiguous() for k, t in tensors.items()}, folder / weights)


def write_pickle(folder, trainer, state):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"trainer": trainer}))
    torch.save(state, folder / "ae.pt")


@pytest.mark.parametrize(
    "name, extra",
    [
        ("sparsify", {"activation": "topk", "transcode": False, "skip_connection": False}),
        ("tada", {"batch_topk": True, "sample_topk": False, "input_unit_norm": False}),
    ],
)
def test_sparsify_and_tada(tmp_path, name, extra):
    p = pieces()
    config = {"expansion_factor": 2, "normalize_decoder": True, "num_latents": 0, "k": K,
              "multi_topk": False, "d_in": D, **extra}  # fmt: skip
    tensors = {"encoder.weight": p["w_enc"], "encoder.bias": p["b_enc"],
               "W_dec": unit(p["w_dec"]), "b_dec": p["b_dec"]}  # fmt: skip
    write(tmp_path / "sae", config, tensors, "sae.safetensors")
    w_enc, b_enc, w_dec, b_dec, x = (
        t.double() for t in (p["w_enc"], p["b_enc"], unit(p["w_dec"]), p["b_dec"], p["x"])
    )
    codes = keep_top((x - b_dec) @ w_enc.T + b_enc, K)
    sae = agrees(tmp_path / "sae", name, codes, codes @ w_dec + b_dec, x)
    assert sae.config.unit_norm and sae.config.tied_bias


def test_sparsify_transcoder_leaves_its_input_alone(tmp_path):
    p = pieces()
    config = {"k": K, "transcode": True, "activation": "topk", "d_in": D, "num_latents": F}
    tensors = {"encoder.weight": p["w_enc"], "encoder.bias": p["b_enc"],
               "W_dec": p["w_dec"], "b_dec": p["b_dec"]}  # fmt: skip
    write(tmp_path / "sae", config, tensors, "sae.safetensors")
    x = p["x"].double()
    codes = keep_top(x @ p["w_enc"].double().T + p["b_enc"].double(), K)
    x_hat = codes @ p["w_dec"].double() + p["b_dec"].double()
    sae = agrees(tmp_path / "sae", "sparsify", codes, x_hat, x)
    assert sae.config.transcoder and not sae.config.unit_norm


@pytest.mark.parametrize("subtracts", [True, False])
@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu", "gated"])
def test_saelens(tmp_path, architecture, subtracts):
    p = pieces()
    config = {"architecture": architecture, "d_in": D, "d_sae": F, "dtype": "float32",
              "apply_b_dec_to_input": subtracts, "normalize_activations": "none",
              "metadata": {"sae_lens_version": "6.54.12"}}  # fmt: skip
    tensors = {"W_enc": p["w_enc"].T, "W_dec": p["w_dec"], "b_dec": p["b_dec"]}
    x = p["x"].double()
    u = x - p["b_dec"].double() * subtracts
    z = u @ p["w_enc"].double().T + p["b_enc"].double()
    if architecture == "gated":
        tensors |= {"b_gate": draw(F, seed=6), "b_mag": p["b_enc"], "r_mag": 0.2 * draw(F, seed=7)}
        projected = u @ p["w_enc"].double().T
        magnitude = projected * tensors["r_mag"].double().exp() + p["b_enc"].double()
        codes = magnitude.relu() * (projected + tensors["b_gate"].double() > 0)
    else:
        tensors["b_enc"] = p["b_enc"]
        codes = z.relu()
    if architecture == "topk":
        config |= {"k": K, "rescale_acts_by_decoder_norm": False}
        codes = keep_top(z, K)
    if architecture == "jumprelu":
        tensors["threshold"] = draw(F, seed=8)  # some below zero, which the ReLU makes void
        codes = z.relu() * (z > tensors["threshold"].double())
    write(tmp_path / "sae", config, tensors, "sae_weights.safetensors")
    x_hat = codes @ p["w_dec"].double() + p["b_dec"].double()
    agrees(tmp_path / "sae", "saelens", codes, x_hat, x)


def test_saelens_rescaled_by_decoder_norm(tmp_path):
    p = pieces()
    config = {"architecture": "topk", "k": K, "rescale_acts_by_decoder_norm": True,
              "apply_b_dec_to_input": True, "normalize_activations": "none",
              "d_in": D, "d_sae": F}  # fmt: skip
    tensors = {"W_enc": p["w_enc"].T, "W_dec": p["w_dec"], "b_dec": p["b_dec"], "b_enc": p["b_enc"]}
    write(tmp_path / "sae", config, tensors, "sae_weights.safetensors")
    x, norm = p["x"].double(), p["w_dec"].double().norm(dim=1)
    z = (x - p["b_dec"].double()) @ p["w_enc"].double().T + p["b_enc"].double()
    codes = keep_top(z * norm, K)
    x_hat = (codes / norm) @ p["w_dec"].double() + p["b_dec"].double()
    agrees(tmp_path / "sae", "saelens", codes, x_hat, x)


def test_saelens_before_version_six(tmp_path):
    p = pieces()
    config = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}, "d_in": D, "d_sae": F,
              "normalize_activations": False, "hook_point": "somewhere"}  # fmt: skip
    tensors = {"W_enc": p["w_enc"].T, "W_dec": p["w_dec"], "b_dec": p["b_dec"], "b_enc": p["b_enc"]}
    write(tmp_path / "sae", config, tensors, "sae_weights.safetensors")
    assert formats.load(tmp_path / "sae").config.architecture == "topk"


@pytest.mark.parametrize("name", ["transcoder", "jumprelu_transcoder"])
def test_saelens_transcoders(tmp_path, name):
    p, out = pieces(), D + 2
    w_dec, b_dec = draw(F, out, seed=9), draw(out, seed=10)
    config = {"architecture": name, "d_in": D, "d_out": out, "d_sae": F,
              "apply_b_dec_to_input": False, "normalize_activations": "none"}  # fmt: skip
    tensors = {"W_enc": p["w_enc"].T, "W_dec": w_dec, "b_dec": b_dec, "b_enc": p["b_enc"]}
    x = p["x"].double()
    z = x @ p["w_enc"].double().T + p["b_enc"].double()
    codes = z.relu()
    if name == "jumprelu_transcoder":
        tensors["threshold"] = torch.full((F,), 0.4)
        codes = z.relu() * (z > tensors["threshold"].double())
    write(tmp_path / "sae", config, tensors, "sae_weights.safetensors")
    agrees(tmp_path / "sae", "saelens", codes, codes @ w_dec.double() + b_dec.double(), x)


def linear_state(p, w_dec):
    return {"encoder.weight": p["w_enc"], "encoder.bias": p["b_enc"], "decoder.weight": w_dec.T}


def dictionary_learning_case(name):
    """(state dict, trainer settings, codes, reconstruction) of a class, in float64."""
    p = pieces()
    w_dec = unit(p["w_dec"]) if "TopK" in name else p["w_dec"]
    d = {k: t.double() for k, t in p.items()} | {"w_dec": w_dec.double()}
    centred = (d["x"] - d["b_dec"]) @ d["w_enc"].T
    z, norm = centred + d["b_enc"], d["w_dec"].norm(dim=1)
    trainer = {"dict_class": name, "k": K}
    state = linear_state(p, w_dec) | {"b_dec": p["b_dec"]}
    if name == "AutoEncoder":
        state = linear_state(p, w_dec) | {"bias": p["b_dec"]}
        codes = z.relu() * norm  # its from_pretrained gives the decoder rows norm 1
        return state, trainer, codes, (codes / norm) @ d["w_dec"] + d["b_dec"], p["x"]
    elif name == "AutoEncoderNew":
        state = linear_state(p, w_dec) | {"decoder.bias": p["b_dec"]}
        codes = (d["x"] @ d["w_enc"].T + d["b_enc"]).relu()
    elif name == "AutoEncoderTopK":
        state |= {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(0.7)}
        codes = keep_top(z, K)
    elif name == "BatchTopKSAE":
        state |= {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(0.7)}
        codes = z.relu() * (z > 0.7)
    elif name == "MatryoshkaBatchTopKSAE":
        state = {"W_enc": p["w_enc"].T, "b_enc": p["b_enc"], "W_dec": w_dec, "b_dec": p["b_dec"],
                 "k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(0.7),
                 "group_sizes": torch.tensor([2, 3, F - 5])}  # fmt: skip
        codes = z.relu() * (z > 0.7)
    elif name == "JumpReluAutoEncoder":
        threshold = 0.5 * draw(F, seed=11).abs()
        state = {"W_enc": p["w_enc"].T, "b_enc": p["b_enc"], "W_dec": w_dec, "b_dec": p["b_dec"],
                 "threshold": threshold}  # fmt: skip
        pre = d["x"] @ d["w_enc"].T + d["b_enc"]
        codes = (pre * (pre > threshold.double())).relu()
    elif name == "GatedAutoEncoder":
        gate, r_mag, mag = draw(F, seed=12), 0.2 * draw(F, seed=13), 0.3 * draw(F, seed=14)
        state = {"encoder.weight": p["w_enc"], "decoder.weight": w_dec.T, "r_mag": r_mag,
                 "gate_bias": gate, "mag_bias": mag, "decoder_bias": p["b_dec"]}  # fmt: skip
        codes = (centred + gate.double() > 0) * (r_mag.double().exp() * centred + mag).relu()
    return state, trainer, codes, codes @ d["w_dec"] + d["b_dec"], p["x"]


@pytest.mark.parametrize(
    "name",
    [
        "AutoEncoder",
        "AutoEncoderNew",
        "AutoEncoderTopK",
        "BatchTopKSAE",
        "MatryoshkaBatchTopKSAE",
        "JumpReluAutoEncoder",
        "GatedAutoEncoder",
    ],
)
def test_dictionary_learning(tmp_path, name):
    state, trainer, codes, x_hat, x = dictionary_learning_case(name)
    write_pickle(tmp_path / "sae", trainer, state)
    sae = agrees(tmp_path / "sae", "dictionary_learning", codes, x_hat, x)
    if name == "MatryoshkaBatchTopKSAE":
        assert sae.config.prefixes == (2, 5, F)
