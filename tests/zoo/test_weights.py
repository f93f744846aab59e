# SPDX-License-Identifier: Apache-2.0
"""The shipped music model and scorers: whole, loadable, and obeying a few plain prompts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sidechain import zoo
from sidechain.pipelines import sites
from sidechain.zoo import load
from sidechain.zoo.music.attributes import INSTRUMENTS
from sidechain.zoo.music.captions import vocabulary
from sidechain.zoo.music.concepts import CONCEPTS

pytestmark = pytest.mark.skipif(
    not (load.WEIGHTS / "music" / load.CHECKSUMS).is_file(),
    reason="the music model is not in this checkout (make zoo-music trains it)",
)


@pytest.fixture(scope="module")
def pipe():
    found = zoo.music()
    found.set_progress_bar_config(disable=True)
    return found


@pytest.fixture(scope="module")
def scorers():
    return zoo.scorers()


@pytest.mark.parametrize("name", ["music", "judges"])
def test_whole_and_small(name):
    folder = load.WEIGHTS / name
    load.verify(folder)
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 12e6


def test_shape_of_the_model(pipe):
    aliases = sites(pipe, kind="cross").aliases
    assert aliases == [f"cross:{index}" for index in range(8)]
    assert set(vocabulary()) <= set(pipe.tokenizer.get_vocab())
    assert pipe.transformer.dtype == torch.float32
    assert not any(module.training for module in (pipe.transformer, pipe.text_encoder))
    gram = pipe.codec.basis @ pipe.codec.basis.T
    torch.testing.assert_close(gram, torch.eye(64), rtol=0, atol=1e-4)


def test_it_plays_what_was_asked(pipe, scorers):
    prompts = [f"a {name} melody" for name in INSTRUMENTS]
    generators = [torch.Generator().manual_seed(seed) for seed in range(8)]
    out = pipe(prompts, num_inference_steps=6, generator=generators, output_type="latent").audios
    assert torch.isfinite(out).all()
    assert 0.5 < float(out.std()) < 2.0
    for scorer in scorers.values():
        picks = scorer.probabilities(out)["instrument"].argmax(1).tolist()
        # six steps are few; the card holds the figures of the full sampler
        assert sum(pick == asked for asked, pick in enumerate(picks)) >= 6


def test_audio(pipe):
    out = pipe(
        "a happy violin melody with drums",
        num_inference_steps=6,
        generator=torch.Generator().manual_seed(0),
    )
    assert out.audios.shape == (1, 1, 81920)
    assert np.isfinite(out.audios).all()
    assert 0.01 < np.sqrt(np.mean(out.audios**2)) < 0.5


def test_concepts_are_localized(pipe):
    if not (load.WEIGHTS / "localization.json").is_file():
        pytest.skip("localization.json is not in this checkout")
    known = sites(pipe, kind="cross").aliases
    for name in CONCEPTS:
        found = zoo.localized(name)
        assert found
        assert set(found) <= set(known)
    with pytest.raises(ValueError, match=r"localized: expected one of .*, got 'oboe'"):
        zoo.localized("oboe")
