# SPDX-License-Identifier: Apache-2.0
"""What SAELens's versions write beside the weights and what of it changes the map."""

import json

import pytest
import torch
from safetensors.torch import save_file

from sae.formats.support import D, F, K, dense_codes, keep_top, pieces
from sidechain.sae import formats


def write(folder, config=None, tensors=None, *, without=()):
    """A folder as versions before 6 wrote them, and its weights."""
    p = pieces()
    folder.mkdir(exist_ok=True)
    known = {"d_in": D, "d_sae": F, "dtype": "float32", "hook_name": "blocks.3",
             "architecture": "standard", "activation_fn_str": "relu", "activation_fn_kwargs": {},
             "apply_b_dec_to_input": True, "normalize_activations": "none",
             "finetuning_scaling_factor": False, "reshape_activations": "none"}  # fmt: skip
    known = {n: v for n, v in (known | (config or {})).items() if n not in without}
    (folder / "cfg.json").write_text(json.dumps(known))
    weights = {"W_enc": p["w_enc"].T, "W_dec": p["w_dec"], "b_dec": p["b_dec"], "b_enc": p["b_enc"]}
    weights |= tensors or {}
    save_file({n: t.contiguous() for n, t in weights.items()}, folder / "sae_weights.safetensors")
    return {n: t.double() for n, t in p.items()}


def expected(p, factor=1.0, k=None):
    z = (p["x"] - p["b_dec"]) @ p["w_enc"].T + p["b_enc"]
    codes = z.relu() if k is None else keep_top(z, k)
    return codes, (codes * factor) @ p["w_dec"] + p["b_dec"]


def check(folder, p, factor=1.0, k=None):
    sae = formats.load(folder).double()
    codes = dense_codes(sae, p["x"])
    for found, wanted in zip(
        (codes, codes @ sae.w_dec + sae.b_dec), expected(p, factor, k), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


FACTOR = 0.5 + torch.arange(F) / F


@pytest.mark.parametrize("name", ["scaling_factor", "finetuning_scaling_factor"])
@pytest.mark.parametrize("wanted", [False, True, None])
def test_a_scaling_factor_of_ones_is_nothing(tmp_path, name, wanted):
    for ones in (torch.ones(F), torch.ones(()), torch.ones(1), 1 + 1e-7 * torch.ones(F)):
        p = write(tmp_path / "s", {"finetuning_scaling_factor": wanted}, {name: ones})
        check(tmp_path / "s", p)


@pytest.mark.parametrize("name", ["scaling_factor", "finetuning_scaling_factor"])
@pytest.mark.parametrize("factor", [FACTOR, torch.tensor(2.0), torch.tensor([2.0])], ids=str)
def test_a_scaling_factor_that_was_trained_goes_into_the_decoder(tmp_path, name, factor):
    p = write(tmp_path / "s", {"finetuning_scaling_factor": True}, {name: factor})
    check(tmp_path / "s", p, factor.double())


def test_the_flag_alone_is_a_factor_of_ones(tmp_path):
    check(tmp_path / "s", write(tmp_path / "s", {"finetuning_scaling_factor": True}))


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({}, {"scaling_factor": FACTOR}, r"scaling_factor of ones .*not set in cfg\.json\], got"),
        ({"finetuning_scaling_factor": 1}, {}, "scaling_factor as true or false .*, got 1$"),
        ({}, {"scaling_factor": torch.ones(F + 1)}, r"of shape \[10\] .*, got \[11\]$"),
        ({}, {"scaling_factor": torch.ones(F, 1)}, r"of shape \[10\] .*, got \[10, 1\]$"),
        (
            {},
            {"scaling_factor": torch.ones(F), "finetuning_scaling_factor": torch.ones(F)},
            "expected one scaling factor",
        ),
        (
            {
                "finetuning_scaling_factor": True,
                "architecture": "topk",
                "k": K,
                "rescale_acts_by_decoder_norm": True,
            },
            {"scaling_factor": FACTOR},
            "not rescaled by the norm",
        ),
    ],
)
def test_scaling_factors_that_are_refused(tmp_path, config, tensors, message):
    write(tmp_path / "s", config, tensors)
    with pytest.raises((ValueError, NotImplementedError), match=message):
        formats.load(tmp_path / "s")


@pytest.mark.parametrize("key", ["activation_fn", "activation_fn_str"])
@pytest.mark.parametrize(
    ("architecture", "activation"),
    [
        ("standard", "tanh-relu"),
        ("standard", "gelu"),
        ("standard", "TopK"),
        ("standard", "batchtopk"),
        ("topk", "abs"),
        ("jumprelu", "topk"),
        ("gated", "tanh-relu"),
    ],
)
def test_an_activation_that_is_not_known_is_not_read_as_relu(
    tmp_path, key, architecture, activation
):
    config = {"architecture": architecture, key: activation, "k": K}
    write(tmp_path / "s", config, without={"activation_fn_str"} - {key})
    with pytest.raises(NotImplementedError, match=rf"expected activation_fn relu.*'{activation}'$"):
        formats.load(tmp_path / "s")


@pytest.mark.parametrize("architecture", [None, "standard", "topk"])
@pytest.mark.parametrize("key", ["activation_fn", "activation_fn_str"])
def test_topk_as_versions_before_six_say_it(tmp_path, architecture, key):
    config = {"architecture": architecture, key: "topk", "activation_fn_kwargs": {"k": K}}
    p = write(tmp_path / "s", config, without={"activation_fn_str"} - {key})
    check(tmp_path / "s", p, k=K)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"activation_fn_str": "topk"}, "expected k in .*activation_fn_kwargs, got none$"),
        (
            {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K, "postact_fn": "abs"}},
            r"activation_fn_kwargs of k .*, got \['postact_fn'\]$",
        ),
        ({"activation_fn": "topk", "activation_fn_kwargs": {"k": K}}, "expected one activation"),
        ({"reshape_activations": "hook_q"}, "reshape_activations none or hook_z .*, got 'hook_q'$"),
        ({"normalize_activations": True}, "got 'expected_average_only_in'"),
        ({"normalize_activations": "mystery"}, r"got 'mystery' \[unknown\]"),
        ({"d_in": D + 1}, r"d_in=6 \[rows of W_enc\] .*, got 7$"),
        ({"d_sae": F + 1}, r"d_sae=10 \[columns of W_enc\] .*, got 11$"),
        ({"architecture": None, "metadata": {"sae_lens_version": "6.1"}}, "expected architecture"),
        ({"architecture": None, "k": K}, "expected architecture"),
    ],
)
def test_settings_that_are_refused(tmp_path, config, message):
    write(tmp_path / "s", config)
    with pytest.raises((ValueError, NotImplementedError), match=message):
        formats.load(tmp_path / "s")


@pytest.mark.parametrize(
    "config",
    [
        {"architecture": None},
        {"normalize_activations": None},
        {"normalize_activations": False},
        {"reshape_activations": "hook_z"},
        {"activation_fn_kwargs": None},
        {"activation_fn": None},
        {"rescale_acts_by_decoder_norm": True},  # only topk has it
    ],
    ids=str,
)
def test_what_the_map_does_not_depend_on(tmp_path, config):
    check(tmp_path / "s", write(tmp_path / "s", config))
