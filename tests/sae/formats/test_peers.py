# SPDX-License-Identifier: Apache-2.0
"""Round trips through the libraries themselves, where they are installed (extra `peers`).

A dictionary of theirs, saved by them, must do the same here; one of ours must do the same there.
"""

import json

import pytest
import torch

from sae.formats.support import D, F, K, dense_codes, draw, keep_top
from sidechain.sae import Sae, SaeConfig, formats

N = 30
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # their arithmetic is float32


def randomise(tensors):
    with torch.no_grad():
        for index, (name, tensor) in enumerate(sorted(tensors.items())):
            if tensor.dtype.is_floating_point and tensor.dim():
                tensor.copy_(0.5 * draw(*tensor.shape, seed=60 + index))
                if "threshold" in name:
                    tensor.abs_()


def ours(architecture, **changes):
    selecting = architecture in ("topk", "batch_topk", "matryoshka")
    sae = Sae(SaeConfig(D, F, architecture, k=K if selecting else None, **changes)).eval()
    with torch.no_grad():
        for name, tensor in [*sae.named_parameters(), *sae.named_buffers()]:
            if "normaliser" not in name and name != "w_dec":
                tensor.copy_(0.5 * draw(*tensor.shape, seed=len(name)) if tensor.dim() else 0.3)
        if sae.threshold is not None:
            sae.threshold.abs_()
    return sae


def reconstruct(sae, x):
    codes = dense_codes(sae, x)
    return codes, codes @ sae.w_dec + sae.b_dec


def lens():
    return pytest.importorskip("sae_lens", reason="sae-lens is not installed: extra `peers`")


SAELENS = {
    "standard": ("relu", {}),
    "topk": ("topk", {"k": K}),
    "jumprelu": ("jumprelu", {}),
    "gated": ("gated", {}),
}


@pytest.mark.parametrize("subtracts", [True, False])
@pytest.mark.parametrize("name", SAELENS)
def test_from_saelens(tmp_path, name, subtracts):
    theirs_, config = lens().registry.get_sae_class(name)
    settings = {"d_in": D, "d_sae": F, "apply_b_dec_to_input": subtracts, **SAELENS[name][1]}
    theirs = theirs_(config(**settings))
    randomise(theirs.state_dict())
    theirs.save_model(tmp_path)
    sae, x = formats.load(tmp_path), draw(N, D, seed=50)
    codes, x_hat = reconstruct(sae, x)
    torch.testing.assert_close(codes, theirs.encode(x), **CLOSE)
    torch.testing.assert_close(x_hat, theirs(x), **CLOSE)


@pytest.mark.parametrize("architecture", ["relu", "topk", "jumprelu", "gated", "batch_topk"])
def test_to_saelens(tmp_path, architecture):
    sae, x = ours(architecture), draw(N, D, seed=51)
    formats.save(sae, tmp_path, "saelens")
    theirs = lens().SAE.load_from_disk(tmp_path)
    codes, x_hat = reconstruct(sae, x)
    torch.testing.assert_close(theirs.encode(x), codes, **CLOSE)
    torch.testing.assert_close(theirs(x), x_hat, **CLOSE)


@pytest.mark.parametrize("architecture", ["relu", "jumprelu"])
def test_transcoders_to_saelens(tmp_path, architecture):
    sae, x = ours(architecture, d_out=D + 2), draw(N, D, seed=52)
    formats.save(sae, tmp_path, "saelens")
    theirs = lens().SAE.load_from_disk(tmp_path)
    torch.testing.assert_close(theirs(x), reconstruct(sae, x)[1], **CLOSE)


def test_from_a_batch_topk_training_checkpoint_of_saelens(tmp_path):
    theirs_, config = lens().registry.get_sae_training_class("batchtopk")
    theirs = theirs_(config(d_in=D, d_sae=F, k=K, rescale_acts_by_decoder_norm=True))
    randomise(theirs.state_dict())
    theirs.topk_threshold.fill_(0.2)
    theirs.save_model(tmp_path / "training")
    theirs.save_inference_model(tmp_path / "inference")
    x = draw(N, D, seed=53)
    first = reconstruct(formats.load(tmp_path / "training"), x)[1]
    second = reconstruct(formats.load(tmp_path / "inference"), x)[1]
    torch.testing.assert_close(first, second, **CLOSE)
    published = lens().SAE.load_from_disk(tmp_path / "inference")
    torch.testing.assert_close(second, published(x), **CLOSE)


def coder(monkeypatch):
    monkeypatch.setenv("SPARSIFY_DISABLE_TRITON", "1")  # read at import; its kernels need a GPU
    return pytest.importorskip("sparsify", reason="eai-sparsify is not installed: extra `peers`")


@pytest.mark.parametrize("transcode", [False, True])
def test_from_and_to_sparsify(tmp_path, monkeypatch, transcode):
    library = coder(monkeypatch)
    config = library.SparseCoderConfig(num_latents=F, k=K, transcode=transcode)
    theirs = library.SparseCoder(D, config)
    randomise(theirs.state_dict())
    theirs.save_to_disk(tmp_path / "theirs")
    sae, x = formats.load(tmp_path / "theirs"), draw(N, D, seed=54)
    encoded = theirs.encode(x)
    dense = torch.zeros(N, F).scatter(1, encoded.top_indices.long(), encoded.top_acts)
    codes, x_hat = reconstruct(sae, x)
    torch.testing.assert_close(codes, dense, **CLOSE)
    torch.testing.assert_close(x_hat, theirs.decode(encoded.top_acts, encoded.top_indices), **CLOSE)
    formats.save(sae, tmp_path / "ours", "sparsify")
    again = library.SparseCoder.load_from_disk(tmp_path / "ours").encode(x)
    torch.testing.assert_close(
        torch.zeros(N, F).scatter(1, again.top_indices.long(), again.top_acts), codes, **CLOSE
    )


def learned(name):
    pytest.importorskip(
        "dictionary_learning", reason="dictionary_learning is not installed: `make peers`"
    )
    from dictionary_learning import dictionary
    from dictionary_learning.trainers import batch_top_k, matryoshka_batch_top_k, top_k

    for module in (dictionary, top_k, batch_top_k, matryoshka_batch_top_k):
        if hasattr(module, name):
            return getattr(module, name)
    pytest.skip(f"this version of dictionary_learning has no {name}")


LEARNED = (
    "AutoEncoder",
    "AutoEncoderNew",
    "AutoEncoderTopK",
    "BatchTopKSAE",
    "MatryoshkaBatchTopKSAE",
    "JumpReluAutoEncoder",
    "GatedAutoEncoder",
)


def make(name):
    more = {"k": K} if "TopK" in name else {}
    if name.startswith("Matryoshka"):
        more["group_sizes"] = [2, 3, F - 5]
    return learned(name)(D, F, **more)


@pytest.mark.parametrize("name", LEARNED)
def test_from_and_to_dictionary_learning(tmp_path, name):
    theirs = make(name)
    randomise(theirs.state_dict())
    if hasattr(theirs, "threshold") and not theirs.threshold.dim():
        theirs.threshold.fill_(0.3)
    (tmp_path / "theirs").mkdir()
    torch.save(theirs.state_dict(), tmp_path / "theirs" / "ae.pt")
    trainer = {"trainer": {"dict_class": name, "k": K}}
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(trainer))
    theirs = learned(name).from_pretrained(tmp_path / "theirs" / "ae.pt")
    sae, x = formats.load(tmp_path / "theirs"), draw(N, D, seed=55)
    codes, x_hat = reconstruct(sae, x)
    torch.testing.assert_close(codes, theirs.encode(x), **CLOSE)
    torch.testing.assert_close(x_hat, theirs.decode(theirs.encode(x)), **CLOSE)
    formats.save(sae, tmp_path / "ours", "dictionary_learning")
    again = learned(name).from_pretrained(tmp_path / "ours" / "ae.pt")
    torch.testing.assert_close(again.encode(x), codes, **CLOSE)


def test_top_of_a_row():
    """The yardstick of this file picks what a plain sort picks."""
    z = draw(5, F, seed=56)
    kept = keep_top(z, K)
    assert int((kept > 0).sum()) <= 5 * K
    for row, all_ in zip(kept, z, strict=True):
        assert sorted(row[row > 0].tolist()) == sorted(
            v for v in sorted(all_.tolist())[-K:] if v > 0
        )
