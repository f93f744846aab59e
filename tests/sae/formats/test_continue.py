# SPDX-License-Identifier: Apache-2.0
"""Import, continue, export: a dictionary of another library trained further here and read there.

Runs where the libraries are installed: `make peers`.
"""

from __future__ import annotations

import json

import pytest
import torch

from sae.formats.support import draw
from sae.formats.test_peers import coder, learned, lens, randomise
from sae.oracle import planted
from sidechain import sae as saes
from sidechain.sae import formats

D, F, K, ROWS = 16, 48, 3, 4096
TRAINING = dict(epochs=12, batch=256, lr=3e-3, progress=False)


def rows():
    """Planted rows with a mean and a scale, as activations have: the run normalises them."""
    return 5 + 4 * planted(ROWS, D, F, K, seed=21)[0]


def fvu(x_hat, target):
    error = (x_hat.detach() - target).double().square().sum()
    return float(error / (target - target.mean(0)).double().square().sum())


def continued(tmp_path, format, theirs, read, x, target=None, **settings):
    """Check the loop; `theirs` and `read(folder)` give the reconstruction of x in the library."""
    start = formats.load(tmp_path / "theirs")
    before = fvu(theirs(x), x if target is None else target)
    with torch.no_grad():
        assert fvu(start(x), x if target is None else target) == pytest.approx(before, rel=1e-4)
    more = {} if target is None else {"target": target}
    own = saes.train(
        x, tmp_path / "run", start=tmp_path / "theirs", **more, **{**TRAINING, **settings}
    )
    assert own.config.features == F and own.config.architecture == start.config.architecture
    assert not own.normaliser.is_identity
    with torch.no_grad():
        here = fvu(own(x), x if target is None else target)
    assert here < 0.7 * before  # it has learned: the export is not what was read
    formats.save(own, tmp_path / "ours", format)
    there = fvu(read(tmp_path / "ours")(x), x if target is None else target)
    assert there == pytest.approx(here, rel=1e-4)


@pytest.mark.parametrize("transcode", [False, True])
def test_sparsify(tmp_path, monkeypatch, transcode):
    library, x = coder(monkeypatch), rows()
    made = library.SparseCoder(
        D, library.SparseCoderConfig(num_latents=F, k=K, transcode=transcode)
    )
    if transcode:
        randomise(made.state_dict())
    made.save_to_disk(tmp_path / "theirs")

    def reconstruction(model):
        def call(x):
            found = model.encode(x)
            return model.decode(found.top_acts, found.top_indices)

        return call

    target = x @ draw(D, D, seed=3) - 7 if transcode else None
    continued(
        tmp_path,
        "sparsify",
        reconstruction(made),
        lambda folder: reconstruction(library.SparseCoder.load_from_disk(folder)),
        x,
        target,
    )


@pytest.mark.parametrize("name", ["standard", "topk", "jumprelu", "gated", "batchtopk"])
def test_saelens(tmp_path, name):
    library, x = lens(), rows()
    training = name == "batchtopk"
    find = library.registry.get_sae_training_class if training else library.registry.get_sae_class
    kind, config = find(name)
    options = {"k": K} if "topk" in name else {}
    made = kind(config(d_in=D, d_sae=F, **options))
    randomise(made.state_dict())
    if training:
        made.topk_threshold.fill_(0.2)
        made.save_inference_model(tmp_path / "inference")
        made.save_model(tmp_path / "theirs")
        made = library.SAE.load_from_disk(tmp_path / "inference")
    else:
        made.save_model(tmp_path / "theirs")
    penalty = {} if options else {"sparsity": 0.01}
    continued(tmp_path, "saelens", made, library.SAE.load_from_disk, x, **penalty)


@pytest.mark.parametrize("name", ["transcoder", "jumprelu_transcoder"])
def test_transcoders_of_saelens(tmp_path, name):
    library, x = lens(), rows()
    kind, config = library.registry.get_sae_class(name)
    made = kind(config(d_in=D, d_sae=F, d_out=D - 3, apply_b_dec_to_input=False))
    randomise(made.state_dict())
    made.save_model(tmp_path / "theirs")
    target = x @ draw(D, D - 3, seed=3) - 7
    continued(tmp_path, "saelens", made, library.SAE.load_from_disk, x, target, sparsity=0.01)


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
    kind, x = learned(name), rows()
    options = {"k": K} if "TopK" in name else {}
    if name.startswith("Matryoshka"):
        options["group_sizes"] = [8, 16, F - 24]
    made = kind(D, F, **options)
    randomise(made.state_dict())
    if options and name != "AutoEncoderTopK":
        made.threshold.fill_(0.3)
    folder = tmp_path / "theirs"
    folder.mkdir()
    torch.save(made.state_dict(), folder / "ae.pt")
    trainer = {"dict_class": name, "activation_dim": D, "dict_size": F} | (
        {"k": K} if options else {}
    )
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))

    def read(folder):
        model = kind.from_pretrained(folder / "ae.pt")
        return lambda x: model.decode(model.encode(x))

    penalty = {} if options else {"sparsity": 0.01}
    continued(tmp_path, "dictionary_learning", read(folder), read, x, **penalty)
