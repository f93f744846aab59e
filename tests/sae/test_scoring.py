# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch

from sidechain import capture
from sidechain.pipelines import PromptPairs
from sidechain.sae import Normaliser, Sae, SaeConfig
from sidechain.sae.features.scoring import (
    ACTIVATIONS,
    METHODS,
    FeatureStatistics,
    feature_statistics,
    on_grid,
    relu_sums,
    selected_sums,
)
from sidechain.testing import tiny_pipeline

F, STEPS = 24, 3
POSITIVE = ["a violin with drums", "a piano with drums", "a flute with drums"]
NEGATIVE = ["a violin", "a piano", "a flute"]
PAIRS = PromptPairs(POSITIVE, NEGATIVE)
CALL = {"num_inference_steps": STEPS, "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def dictionary(pipe, seed=0, architecture="topk"):
    from sidechain import sites

    width = sites(pipe, "cross:1")[0].width
    made = torch.Generator().manual_seed(seed)
    normaliser = Normaliser(
        0.1 * torch.randn(STEPS, width, generator=made),
        torch.rand(STEPS, generator=made) + 0.2,
        torch.arange(STEPS),
    )
    k = 4 if architecture in ("topk", "batch_topk") else None
    sae = Sae(SaeConfig(width, F, architecture, k=k), normaliser=normaliser, seed=seed).eval()
    with torch.no_grad():
        sae.b_enc.copy_(0.1 * torch.randn(F, generator=made))
        if architecture == "batch_topk":
            sae.threshold.fill_(0.4)
        if architecture == "jumprelu":
            sae.threshold.copy_(torch.rand(F, generator=made))
        if architecture == "gated":
            sae.r_mag.copy_(0.3 * torch.randn(F, generator=made))
            sae.b_gate.copy_(0.1 * torch.randn(F, generator=made))
    return sae


def statistics(pipe, sae, batch_size=2, **changes):
    call = {**CALL, **changes}
    return feature_statistics(
        pipe, {"cross:1": sae}, PAIRS, batch_size=batch_size, progress=False, **call
    )["cross:1"]


def dense(pipe, sae):
    """[S, 2 sides, P, T, F] relu and selected activations in float64, from a plain capture."""
    positive, selected = [], []
    for prompts in (POSITIVE, NEGATIVE):
        rows = []
        for seed, prompt in enumerate(prompts):
            with capture(pipe, "cross:1", reduce="tokens") as cap:
                pipe(prompt, generator=torch.Generator().manual_seed(seed), **CALL)
            rows.append(cap["cross:1"][:, 0, 0])
        x = torch.stack(rows, 1).double()  # [S, P, T, C]
        wide = sae.normaliser
        y = (x - wide.mean.double()[:, None, None]) / wide.scale.double()[:, None, None, None]
        projected = (y - sae.b_pre.double()) @ sae.w_enc.double().T
        if sae.r_mag is not None:
            gate = projected + sae.b_gate.double() > 0
            z = projected * sae.r_mag.double().exp() + sae.b_enc.double()
            selected.append(z.clamp(min=0) * gate)
        else:
            z = projected + sae.b_enc.double()
            if sae.config.architecture == "topk":
                top = z.topk(4, dim=-1).indices
                selected.append(torch.zeros_like(z).scatter(-1, top, 1.0) * z.clamp(min=0))
            else:
                selected.append(z * (z > sae.threshold.double()))
        positive.append(z.clamp(min=0))
    return torch.stack(positive, 1), torch.stack(selected, 1)


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("architecture", ["topk", "batch_topk", "jumprelu", "gated"])
def test_statistics_equal_dense_expressions(pipe, architecture, activations):
    sae = dictionary(pipe, architecture=architecture)
    found = statistics(pipe, sae, activations=activations)
    positive, selected = (t.detach() for t in dense(pipe, sae))
    positive = positive if activations == "relu" else selected
    flat = positive.flatten(2, 3)  # [S, 2, P T, F]
    close = {"rtol": 1e-4, "atol": 1e-5}  # batches of other sizes round in other ways
    torch.testing.assert_close(found.mean, flat.mean(2), **close)
    torch.testing.assert_close(found.variance, flat.var(2), **close)
    torch.testing.assert_close(found.selected, selected.flatten(2, 3).mean(2), **close)
    torch.testing.assert_close(
        found.rate, (selected > 0).double().flatten(2, 3).mean(2), rtol=0, atol=0.02
    )
    torch.testing.assert_close(
        found.pooled.double(), torch.cat([positive[:, 0], positive[:, 1]], 1).mean(2), **close
    )
    assert found.steps.tolist() == list(range(STEPS)) and found.rows == flat.shape[2]


@pytest.mark.parametrize("tile", [1, 7 * F, 40 * F, 1 << 22], ids="{} pairs".format)
@pytest.mark.parametrize("architecture", ["topk", "jumprelu"])
def test_tiles_do_not_matter(pipe, architecture, tile, monkeypatch):
    sae = dictionary(pipe, architecture=architecture)
    x = torch.randn(5, 13, sae.config.d_in, generator=torch.Generator().manual_seed(0))
    z = sae.preactivations(x, step=1).detach().relu().view(5, 13, F)
    codes = [sae.encode(sample, step=1) for sample in x]
    monkeypatch.setattr("sidechain.sae.features.scoring._PAIRS", tile)
    sums, squares = relu_sums(sae, x, 1)
    torch.testing.assert_close(sums, z.sum(1))
    torch.testing.assert_close(squares, z.square().sum(1))
    selected = selected_sums(sae, x, 1)
    assert selected.rows.tolist() == [13] * 5
    for own, code in zip(selected.sums, codes, strict=True):
        dense = torch.zeros(F + 1).index_add(
            0, code.indices.flatten().long() % (F + 1), code.values.flatten().detach()
        )
        torch.testing.assert_close(own, dense[:F])


def test_scored_activations_are_known(pipe):
    with pytest.raises(ValueError, match="activations to be one of relu, selected, got 'all'"):
        statistics(pipe, dictionary(pipe), activations="all")


def test_the_batch_does_not_matter(pipe):
    sae = dictionary(pipe)
    one, three = statistics(pipe, sae, batch_size=1), statistics(pipe, sae, batch_size=3)
    torch.testing.assert_close(one.mean, three.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one.pooled, three.pooled, rtol=1e-4, atol=1e-5)


def test_scores_are_the_published_formulas(pipe):
    s = statistics(pipe, dictionary(pipe))
    plus, minus = s.mean[:, 0].numpy(), s.mean[:, 1].numpy()
    pooled = np.sqrt(
        ((s.rows - 1) * s.variance[:, 0].numpy() + (s.rows - 1) * s.variance[:, 1].numpy())
        / (2 * s.rows - 2)
    )
    expected = {
        "tada": plus * np.log(1 + 1 / (minus + 1e-6)),
        "diff": plus - minus,
        "ratio": plus / (minus + 1e-6),
        "mean_pos": plus,
        "cohens_d": (plus - minus) / (pooled + 1e-6),
    }
    assert {*expected, "logistic"} == set(METHODS)
    for method, values in expected.items():
        np.testing.assert_allclose(s.score(method).numpy(), values, rtol=1e-9)
    assert s.score("logistic").shape == (STEPS, F)


def planted(feature, other):
    """Statistics in which one feature stands for the concept and another is always on."""
    mean = torch.full((1, 2, F), 0.01, dtype=torch.float64)
    mean[:, 0, feature], mean[:, 1, feature] = 0.8, 0.0
    mean[:, :, other] = 0.7
    generator = torch.Generator().manual_seed(1)
    pooled = mean.repeat_interleave(5, dim=1) + 1e-3 * torch.rand(1, 10, F, generator=generator)
    return FeatureStatistics(
        torch.tensor([0]), torch.tensor([9.0]), None, mean, torch.full_like(mean, 0.01),
        mean, (mean > 0).double(), pooled.float(), 50,
    )  # fmt: skip


@pytest.mark.parametrize("method", [m for m in METHODS if m != "mean_pos"])
def test_a_planted_feature_is_ranked_first(method):
    assert int(planted(17, 3).top(method, 1)) == 17
    assert planted(17, 3).score(method)[0, 17] > 2 * planted(17, 3).score(method)[0, 3]


def test_a_dictionary_moves_to_the_grid_of_the_run(pipe):
    sae = dictionary(pipe)
    found = statistics(pipe, sae)
    sae.normaliser.timesteps = found.timesteps.clone()
    assert on_grid(sae, found.timesteps) is sae
    more = statistics(pipe, sae, num_inference_steps=STEPS + 2)
    assert len(more.steps) == STEPS + 2
    moved = on_grid(sae, more.timesteps)
    assert moved.w_enc is sae.w_enc and len(moved.normaliser.scale) == STEPS + 2
    assert len(sae.normaliser.scale) == STEPS
    end = moved.normaliser.mean[-1], sae.normaliser.mean[-1]
    if more.timesteps[-1] == found.timesteps[-1]:
        torch.testing.assert_close(*end)


BAD = {
    "no dictionary": ({"saes": {}}, "at least one dictionary"),
    "width": ({"saes": {"cross:1": Sae(SaeConfig(3, F, "relu"))}}, "dictionary of width"),
    "generator": ({"generator": None}, "expected no generator"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_calls(pipe, name):
    changes, message = BAD[name]
    call = {"saes": {"cross:1": dictionary(pipe)}, "pairs": PAIRS}
    with pytest.raises(ValueError, match=message):
        feature_statistics(pipe, **{**call, **changes}, progress=False, **CALL)


def test_bad_scores():
    with pytest.raises(ValueError, match="expected method to be one of tada, diff"):
        planted(1, 2).score("best")
    with pytest.raises(ValueError, match=r"1 <= count <= 24 \[features\], got 25"):
        planted(1, 2).top("tada", 25)
