# SPDX-License-Identifier: Apache-2.0
"""Starting from a dictionary: the first weights are its map, and what may change."""

from __future__ import annotations

import math

import pytest
import torch

from sidechain.sae import ARCHITECTURES, Normaliser, Provenance, Sae, SaeConfig, formats, starting
from sidechain.sae.training.state import Rows, TrainState
from sidechain.sae.training.train_config import TrainConfig

D, OUT, F, K, N = 12, 9, 40, 4, 64


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def dictionary(architecture, *, seed=1, **config):
    """A dictionary in the units of the activations, every tensor of it drawn."""
    if ARCHITECTURES[architecture].takes("k"):
        config.setdefault("k", K)
    sae = Sae(SaeConfig(D, F, architecture, **config), seed=seed).eval()
    with torch.no_grad():
        for index, (name, tensor) in enumerate(sorted(sae.weights().items())):
            if name == "b_pre":
                sae.b_pre = 5 + draw(D, seed=index)
            elif name == "threshold":
                tensor.copy_(1.5 + 0.3 * draw(*tensor.shape, seed=index))
            elif name != "w_dec" or not sae.config.unit_norm:
                tensor.copy_(draw(*tensor.shape, seed=index) + 3 * (name == "b_dec"))
    return sae


def fitted(width, seed):
    return Normaliser(3 + draw(1, width, seed=seed), torch.tensor([2.5 + seed / 10]))


def state_of(sae, config, own, target, **more):
    """A state of training with the weights that the run starts with."""
    penalty = {} if config.kind.selects else {"sparsity": 1.0}
    state = TrainState(config, TrainConfig(tokens=N, batch=N, **penalty), own, target)
    found = starting.weights(sae, config, own, target, **more)
    fixed = found.pop("b_pre", None)
    assert found.keys() == state.weights.keys()
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32 and tensor.is_contiguous()
        state.weights[name].copy_(tensor)
    assert (fixed is None) == (state.fixed_b_pre is None)
    if fixed is not None:
        state.fixed_b_pre.copy_(fixed)
    return state


def reconstructed(sae, x):
    """x_hat in float64, densely, by the definition of `Sae`; the codes in units of x_hat."""
    w = {name: t.detach().double() for name, t in sae.weights().items()}
    own, target = sae.normaliser, sae.target_normaliser
    y = (x.double() - own.mean[0].double()) / own.scale[0].double()
    p = (y - w.get("b_pre", w["b_dec"])) @ w["w_enc"].T
    z, name = p + w["b_enc"], sae.config.architecture
    keep = z > 0
    if name == "topk":
        keep &= torch.zeros_like(z, dtype=bool).scatter(1, z.topk(sae.config.k, 1).indices, True)
    elif name == "gated":
        z = p * w["r_mag"].exp() + w["b_enc"]
        keep = (p + w["b_gate"] > 0) & (z > 0)
    elif name != "relu":
        keep &= z > w["threshold"]
    z = torch.where(keep, z, 0.0)
    assert 0 < int(keep.sum()) < keep.numel()
    out_scale = target.scale[0].double()
    return (z @ w["w_dec"] + w["b_dec"]) * out_scale + target.mean[0].double(), z * out_scale


CASES = [(name, {}) for name in ARCHITECTURES]
CASES += [(name, {"tied_bias": False, "unit_norm": False}) for name in ARCHITECTURES]
CASES += [(name, {"transcoder": True, "d_out": OUT}) for name in ARCHITECTURES]


@pytest.mark.parametrize(("architecture", "shape"), CASES)
def test_the_first_weights_are_the_map_of_the_dictionary(architecture, shape):
    sae = dictionary(architecture, **shape)
    own = fitted(D, 3)
    target = fitted(sae.config.width_out, 7) if sae.config.transcoder else None
    config = starting.shaped(sae, {})
    assert config == sae.config
    made = state_of(sae, config, own, target).to_sae()
    assert made.normaliser.scale.item() != 1
    x = 3 + 2 * draw(N, D, seed=9)
    expected, codes = reconstructed(sae, x)
    found, same = reconstructed(made, x)
    for a, b in ((found, expected), (same, codes)):
        assert float((a - b).norm() / b.norm()) < 1e-5
    with torch.no_grad():
        mine, theirs = made(x), sae(x)  # by the ops
    assert float((mine - theirs).norm() / theirs.norm()) < 1e-5


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_dictionary_with_normalisers_keeps_them_and_every_bit(architecture):
    sae = dictionary(architecture)
    grid = Normaliser(draw(3, D, seed=2), torch.tensor([0.5, 2.0, 8.0]), torch.tensor([0, 6, 12]))
    sae.normaliser = sae.target_normaliser = grid

    def of_the_data(kind):
        assert kind == "step"
        return Normaliser(draw(2, D), torch.ones(2), torch.tensor([0, 12])), None

    own, target = starting.normalisers(sae, of_the_data, "global")
    assert own is grid and target is None
    for name, tensor in starting.weights(sae, sae.config, own.copy(), target).items():
        assert torch.equal(tensor, getattr(sae, name)), name


def test_one_in_units_of_the_activations_takes_one_entry_of_the_data():
    asked = []

    def of_the_data(kind):
        asked.append(kind)
        return (Normaliser.identity(D) if kind == "none" else fitted(D, 1)), None

    sae = dictionary("topk")
    assert starting.normalisers(sae, of_the_data, "none")[0].is_identity
    assert not starting.normalisers(sae, of_the_data, "step")[0].is_identity
    assert asked == ["none", "global"]


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (torch.tensor([0, 7]), r"rows of scheduler steps \[0, 6, 12\] \[.*\], got step 7$"),
        (None, r"rows with scheduler steps of \[0, 6, 12\].*got rows without steps$"),
    ],
)
def test_steps_that_the_dictionary_does_not_know(steps, message):
    sae = dictionary("topk")
    grid = Normaliser(draw(3, D), torch.ones(3), torch.tensor([0, 6, 12]))
    sae.normaliser = sae.target_normaliser = grid
    entries = 1 if steps is None else len(steps)
    data = Normaliser(draw(entries, D), torch.ones(entries), steps)
    with pytest.raises(ValueError, match=message):
        starting.normalisers(sae, lambda kind: (data, None), "step")


def test_several_entries_do_not_fit_one_map():
    grid = Normaliser(draw(2, D), torch.ones(2), torch.tensor([0, 6]))
    with pytest.raises(ValueError, match=r"expected one normaliser for all steps .*, got 2$"):
        sae = dictionary("topk")
        starting.weights(sae, sae.config, grid)


@pytest.mark.parametrize("shape", [{}, {"unit_norm": False, "transcoder": True, "d_out": OUT}])
@pytest.mark.parametrize("architecture", ["matryoshka", "jumprelu", "gated"])
def test_growth(architecture, shape):
    sae = dictionary(architecture, **shape)
    config = starting.shaped(sae, {"features": F + 30})
    target = fitted(OUT, 2) if shape else None
    found = starting.weights(sae, config, fitted(D, 1), target, seed=5)
    before = starting.weights(sae, sae.config, fitted(D, 1), target)
    again = starting.weights(sae, config, fitted(D, 1), target, seed=6)
    for name, tensor in before.items():
        grown = found[name]
        if grown.dim() and len(grown) == F + 30:
            assert torch.equal(grown[:F], tensor), name
        else:
            assert torch.equal(grown, tensor), name
    lengths = found["w_enc"].norm(dim=1)
    assert torch.allclose(lengths[F:], lengths[:F].mean().expand(30), rtol=1e-5)
    rows = found["w_dec"].norm(dim=1)
    assert torch.allclose(rows[F:], rows[:F].mean().expand(30), rtol=1e-5)
    assert not torch.equal(found["w_dec"][F:], again["w_dec"][F:])
    assert not bool(found["b_enc"][F:].any())
    if architecture == "jumprelu":
        assert torch.allclose(found["threshold"][F:], before["threshold"].mean().expand(30))
    if architecture == "gated":
        assert torch.allclose(found["r_mag"][F:], before["r_mag"].mean().expand(30))
        assert not bool(found["b_gate"][F:].any())
    if architecture == "matryoshka":
        assert config.prefixes == (*sae.config.prefixes, F + 30)
    state_of(sae, config, fitted(D, 1), target)  # every tensor fits


@pytest.mark.parametrize("old", ["topk", "batch_topk", "matryoshka"])
@pytest.mark.parametrize("new", ["topk", "batch_topk", "matryoshka"])
def test_among_the_architectures_that_select(old, new):
    sae = dictionary(old)
    config = starting.shaped(sae, {"architecture": new, "k": 7})
    assert (config.architecture, config.k) == (new, 7)
    own = fitted(D, 1)
    found = starting.weights(sae, config, own)
    if new == "topk":
        assert "threshold" not in found
    elif old == "topk":
        assert math.isnan(found["threshold"])
    else:
        assert torch.allclose(found["threshold"], sae.threshold / own.scale[0])
    made = state_of(sae, config, own, None).to_sae()
    x = 3 + draw(N, D, seed=3)
    torch.testing.assert_close(made.preactivations(x) * own.scale[0], sae.preactivations(x))


@pytest.mark.parametrize(
    ("architecture", "wanted", "error", "message"),
    [
        ("topk", {"d_in": 13}, ValueError, r"start: expected d_in=12 \[.*\], got 13$"),
        ("topk", {"d_out": 13}, ValueError, "start: expected d_out=12 "),
        ("topk", {"transcoder": True}, ValueError, "start: expected transcoder=False"),
        ("topk", {"unit_norm": False}, ValueError, "start: expected unit_norm=True"),
        ("topk", {"tied_bias": False}, ValueError, "start: expected tied_bias=True"),
        ("topk", {"features": 39}, ValueError, r"features >= 40 .*, got 39$"),
        ("topk", {"architecture": "relu"}, ValueError, "architecture topk, batch_topk, matryoshka"),
        ("relu", {"architecture": "gated"}, ValueError, "expected architecture relu .*'gated'$"),
        ("relu", {"architecture": "topk"}, ValueError, "expected architecture relu .*'topk'$"),
        ("relu", {"architecture": ["topk"]}, ValueError, "expected architecture relu "),
        ("relu", {"k": 3}, ValueError, "expected no k"),
        ("topk", {"k": 41}, ValueError, "1 <= k <= 40"),
        ("topk", {"features": True}, TypeError, "features as int"),
        ("topk", {"colour": 1}, TypeError, r"got \['colour'\]$"),
    ],
)
def test_what_cannot_change(architecture, wanted, error, message):
    with pytest.raises(error, match=message):
        starting.shaped(dictionary(architecture), wanted)


def test_what_a_dictionary_is_given_as(tmp_path):
    sae = dictionary("topk")
    sae.provenance = Provenance(site="mid", tokens=500, extra={"start": {"digest": "older"}})
    formats.save(sae, tmp_path / "one.safetensors")
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text("{}")
    formats.save(sae, run / "sae.safetensors")
    formats.save(sae, tmp_path / "lens", "saelens")
    digests = []
    for start in (sae, tmp_path / "one.safetensors", str(run), run / "sae.safetensors"):
        found, facts = starting.opened(start)
        assert torch.equal(found.w_enc, sae.w_enc) and found is not sae
        assert (facts["tokens"], facts["site"], facts["k"]) == (500, "mid", K)
        assert facts["start"] == {"digest": "older"}
        digests.append(facts["digest"])
    assert len(set(digests)) == 1
    assert starting.opened(tmp_path / "lens")[1]["format"] == "saelens"
    with torch.no_grad():
        found.w_dec[3, 4] += 1e-3
    assert starting.digest(found) not in digests  # and what was given did not change
    assert starting.opened(sae)[1]["digest"] in digests


def test_a_run_that_is_not_finished(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ValueError, match=r"expected a finished run, got one without sae\.safe"):
        starting.opened(tmp_path)


def test_what_is_no_start(tmp_path):
    with pytest.raises(TypeError, match=r"start: expected a Sae, .*, got list$"):
        starting.opened([1])
    with pytest.raises(FileNotFoundError, match="expected a dictionary, got nothing at"):
        starting.opened(tmp_path / "nowhere")
    sae = dictionary("topk")
    sae.target_normaliser = fitted(D, 4)
    with pytest.raises(ValueError, match=r"one normaliser of input and output .*, got two"):
        starting.opened(sae)
    sae = dictionary("topk")
    with torch.no_grad():
        sae.b_enc[0] = math.nan
    with pytest.raises(ValueError, match=r"start: .*finite b_enc"):
        starting.opened(sae)


def test_a_started_state_learns():
    """The weights fit a step of training, and its loss is that of the dictionary."""
    from sidechain.sae.training.step import train_step

    sae = dictionary("topk")
    x = 3 + draw(N, D, seed=3)
    own = fitted(D, 1)
    state = state_of(sae, sae.config, own, None)
    first = train_step(state, Rows(x)).row_loss.double()
    expected = ((sae(x) - x) / own.scale[0]).double().square().sum(1)
    torch.testing.assert_close(first, expected, rtol=1e-4, atol=1e-4)
