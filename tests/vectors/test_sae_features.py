# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from sidechain import sites, steer
from sidechain.sae import Normaliser, Sae, SaeConfig
from sidechain.sae.features.scoring import FeatureStatistics
from sidechain.vectors import WEIGHTINGS, PromptPairs, SteeringVector, sae_features

F, STEPS = 16, 4


@pytest.fixture
def parts(pipe):
    """A dictionary and made-up statistics of its features."""
    (site,) = sites(pipe, "cross:1")
    made = torch.Generator().manual_seed(0)
    scale = torch.tensor([4.0, 2.0, 1.0, 0.5])
    normaliser = Normaliser(torch.zeros(STEPS, site.width), scale, torch.arange(STEPS))
    sae = Sae(SaeConfig(site.width, F, "topk", k=3), normaliser=normaliser)
    mean = torch.rand(STEPS, 2, F, generator=made, dtype=torch.float64)
    kept = mean * torch.rand(STEPS, 2, F, generator=made, dtype=torch.float64)
    pooled = torch.rand(STEPS, 6, F, generator=made)
    grid = torch.linspace(900, 1, STEPS).double()
    found = FeatureStatistics(
        torch.arange(STEPS), grid, None, mean, mean / 3, kept, kept.clamp(max=1), pooled, 10
    )
    return site, sae, found


def build(pipe, parts, **options):
    _, sae, found = parts
    return sae_features(pipe, {"cross:1": sae}, {"cross:1": found}, **options)


@pytest.mark.parametrize("method", ["tada", "cohens_d"])
def test_directions_are_weighted_decoder_rows(pipe, parts, method):
    site, sae, found = parts
    vectors = {w: build(pipe, parts, method=method, count=5, weighting=w) for w in WEIGHTINGS}
    for step in range(STEPS):
        ranked = found.score(method)[step].argsort(descending=True)[:5]
        rows = sae.w_dec.detach().double()[ranked] * sae.normaliser.scale[step]
        score = found.score(method)[step, ranked]
        difference = found.selected[step, 0, ranked] - found.selected[step, 1, ranked]
        weights = {
            "natural": difference,
            "none": torch.ones(5).double(),
            "raw": score / score.sum(),
            "softmax": score.exp() / score.exp().sum(),
            "sqrt": score.clamp(min=0).sqrt() / score.clamp(min=0).sqrt().sum(),
            "log": (1 + score.clamp(min=0)).log() / (1 + score.clamp(min=0)).log().sum(),
        }
        for name, vector in vectors.items():
            expected = (weights[name][:, None] * rows).sum(0).float()
            torch.testing.assert_close(vector[site.name][step], expected, rtol=1e-5, atol=1e-6)


def test_all_features_give_the_difference_of_the_reconstructions(pipe, parts):
    site, sae, found = parts
    vector = build(pipe, parts, count=F)
    mean = found.selected @ sae.w_dec.detach().double() + sae.b_dec.detach().double()
    expected = (mean[:, 0] - mean[:, 1]) * sae.normaliser.scale[:, None]
    torch.testing.assert_close(vector[site.name], expected.float(), rtol=1e-5, atol=1e-6)


def test_features_of_some_steps_at_all_steps(pipe, parts):
    site, sae, _ = parts
    every = build(pipe, parts, count=3)[site.name] / sae.normaliser.scale[:, None]
    some = build(pipe, parts, count=3, from_steps=[1, 2])[site.name]
    shared = every[1:3].mean(0)
    torch.testing.assert_close(some, shared * sae.normaliser.scale[:, None])


def test_it_is_an_ordinary_vector(pipe, parts, tmp_path):
    _, sae, found = parts
    pairs = PromptPairs(["a", "b", "c"], ["d", "e", "f"], "drums", seeds=4)
    vector = sae_features(
        pipe, {"cross:1": sae}, {"cross:1": found}, pairs, count=4, num_inference_steps=STEPS
    )
    vector.save(tmp_path / "v.safetensors")
    again = SteeringVector.load(tmp_path / "v.safetensors", pipe)
    assert again.provenance.method == "sae:tada:natural:4" and again.concept == "drums"
    assert again.provenance.positive == again.provenance.negative == 3
    assert again.provenance.seeds == (4, 5, 6)
    assert again.provenance.call == {"num_inference_steps": STEPS}
    assert again.branches == ["cond"]
    with steer(pipe, again, strength=1.0) as tap:
        assert list(tap.sites.aliases) == ["cross:1"]
        pipe("a song", num_inference_steps=STEPS)


BAD = {
    "weighting": ({"weighting": "best"}, "expected weighting to be one of natural, none"),
    "method": ({"method": "best"}, "expected method to be one of"),
    "count": ({"count": 0}, "1 <= count"),
    "steps": ({"count": 3, "from_steps": [7]}, r"from_steps of \[0, 1, 2, 3\], got \[7\]"),
    "no steps": ({"count": 3, "from_steps": []}, "from_steps of"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_options(pipe, parts, name):
    options, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        build(pipe, parts, **options)


def test_a_site_without_a_dictionary(pipe, parts):
    with pytest.raises(ValueError, match=r"sites \['cross:0'\]"):
        sae_features(pipe, {"cross:0": parts[1]}, {"cross:1": parts[2]})
