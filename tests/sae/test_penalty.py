# SPDX-License-Identifier: Apache-2.0
"""Penalised architectures on rows whose atoms are known: defaults, L0 asked for, collapse."""

from __future__ import annotations

import functools
import itertools
import json
import math
import warnings

import pytest
import torch

from sidechain.sae import Normaliser, Rows, Sae, SaeConfig, TrainConfig, train
from sidechain.sae.planted import planted_rows, share_found
from sidechain.sae.training import checkpoint
from sidechain.sae.training.collapse import CollapseWatch, collapsed
from sidechain.sae.training.state import TrainState
from sidechain.sae.training.step import train_step
from sidechain.sae.training.train_config import Schedule
from sidechain.sae.training.train_metrics import Metrics

#: Settings, and the coefficient that leaves about 4 of 64 features active at d = 24.
PENALISED = {
    "relu": (dict(architecture="relu"), 2.7),
    "gated": (dict(architecture="gated"), 2.7),
    "jumprelu, tanh": (dict(architecture="jumprelu"), 0.2),
    "jumprelu, l0": (dict(architecture="jumprelu", penalty="l0"), 1.0),
}


@functools.cache
def rows(count, width, atoms, active):
    """Planted rows with mean 0 and E|y|^2 = d."""
    x, table = planted_rows(count, width, atoms, active=active, noise=0.02)
    x = x - x.mean(0)
    return x / x.square().mean().sqrt(), table


def prepared(x, features, batch, *, architecture, k=None, **settings):
    width = x.shape[1]
    train_config = TrainConfig(tokens=len(x), batch=batch, **settings)
    config = SaeConfig(width, features, architecture, k=k)
    state = TrainState(config, train_config, Normaliser.identity(width))
    state.start_biases(Rows(x[:batch]))
    return state


def trained(state, x):
    """Train to the end; returns the metrics of the last tenth of the run."""
    metrics, batch = Metrics(state), state.train.batch
    for step in range(state.train.steps):
        if step == state.train.steps * 9 // 10:
            metrics = Metrics(state)
        metrics.add(train_step(state, Rows(x[step * batch :][:batch])))
    metrics.read()
    return metrics.flush()


@pytest.mark.parametrize("case", PENALISED)
def test_l0_falls_with_sparsity_over_two_decades(case):
    settings, middle = PENALISED[case]
    x, _ = rows(100_000, 24, 64, 4)
    counts = [
        trained(prepared(x, 64, 512, **settings, sparsity=middle * factor), x)["l0"]
        for factor in (0.1, 0.4, 1.6, 10)
    ]
    assert all(a > 1.2 * b for a, b in itertools.pairwise(counts)), counts
    assert counts[0] > 10 and counts[-1] < 2


@pytest.mark.parametrize("shape", [(300_000, 24, 64, 4), (150_000, 64, 256, 8)], ids=str)
def test_defaults_explain_about_as_much_as_topk(shape):
    """An L1 penalty takes from every value (arXiv 2404.16014): relu explains less."""
    x, atoms = rows(*shape)
    features, active = shape[2:]
    topk = prepared(x, features, 512, architecture="topk", k=active)
    best = trained(topk, x)["fvu"]
    most = share_found(topk.weights["w_dec"], atoms, 0.9)
    for case, (settings, _) in PENALISED.items():
        state = prepared(x, features, 512, **settings, l0=active)
        metrics = trained(state, x)
        assert metrics["fvu"] < (3 if case == "relu" else 2) * best, case
        assert metrics["dead"] < 0.3, case
        assert metrics["l0"] == pytest.approx(active, rel=0.05), case
        if case in ("relu", "gated"):
            assert share_found(state.weights["w_dec"], atoms, 0.9) > 0.8 * most, case


@pytest.mark.parametrize("factor", [0.1, 10])
@pytest.mark.parametrize("case", PENALISED)
def test_l0_is_met_from_a_start_far_off(case, factor):
    x, _ = rows(300_000, 24, 64, 4)
    state = prepared(x, 64, 384, **PENALISED[case][0], l0=5)
    state.control.values += math.log(factor)
    assert trained(state, x)["l0"] == pytest.approx(5, rel=0.05)


def test_without_settings_l0_is_that_of_k():
    x, _ = rows(100_000, 24, 64, 4)
    metrics = trained(prepared(x, 64, 512, architecture="gated"), x)
    assert metrics["l0"] == pytest.approx(16, rel=0.1)


@pytest.mark.parametrize("architecture", ["relu", "gated", "jumprelu"])
def test_every_feature_fires_at_first_as_often_as_asked(architecture):
    """Also where rows spread a hundred times more in one direction than in another."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4096, 24, generator=generator) * torch.logspace(-1, 1, 24) + 3
    state = prepared(x, 64, 4096, architecture=architecture, l0=6)
    codes = state.to_sae().encode(x)
    share = torch.bincount(codes.indices[codes.indices >= 0].long(), minlength=64) / len(x)
    assert float(share.sum()) == pytest.approx(6, rel=0.15)
    assert float(share.min()) > 0.05 and float(share.max()) < 0.15


def test_a_controlled_step_waits_for_nothing(monkeypatch):
    def refused(self, *args, **kwargs):
        raise AssertionError("a step read a value back")

    x, _ = rows(100_000, 24, 64, 4)
    for settings, _ in PENALISED.values():
        state = prepared(x, 64, 512, **settings)
        metrics = Metrics(state)
        with monkeypatch.context() as patch:
            for name in ("item", "tolist", "__bool__", "__float__", "__int__", "nonzero"):
                patch.setattr(torch.Tensor, name, refused)
            metrics.add(train_step(state, Rows(x[:512])))
            metrics.read()
        assert metrics.flush()["sparsity"] == float(state.control.coefficient) > 0


def test_a_checkpoint_keeps_the_coefficient(tmp_path):
    x, _ = rows(100_000, 24, 64, 4)
    state, other = (prepared(x, 64, 512, architecture="relu", l0=4) for _ in range(2))
    for part in x[:5120].split(512):
        train_step(state, Rows(part))
    checkpoint.save(tmp_path, state, {})
    assert not torch.equal(other.control.values, state.control.values)
    checkpoint.load(checkpoint.latest(tmp_path), other)
    assert torch.equal(other.control.values, state.control.values)
    for part in x[5120:10240].split(512):
        for one in (state, other):
            train_step(one, Rows(part))
    for (name, value, _), (_, again, _) in zip(state.named(), other.named(), strict=True):
        assert torch.equal(value, again), name


def test_a_fixed_penalty_may_give_way_to_an_l0(tmp_path):
    x, _ = rows(100_000, 24, 64, 4)
    settings = dict(architecture="gated", **SHORT)
    train([x], tmp_path, **settings, sparsity=2.0)
    later = {**settings, "tokens": 76_800, "reason": "fewer features"}
    sae = train([x], tmp_path, **later, l0=6)
    assert sae.provenance.metrics["l0"] == pytest.approx(6, rel=0.1)
    assert sae.provenance.extra["changes"][0]["settings"]["sparsity"] == [2.0, None]


def test_resampled_features_get_a_first_limit():
    from sidechain.sae.training.resample import resample

    x, _ = rows(100_000, 24, 64, 4)
    for architecture, name, sign in (("relu", "b_enc", -1), ("jumprelu", "threshold", 1)):
        state = prepared(x, 64, 512, architecture=architecture, l0=4, dead_tokens=512)
        state.step, state.last_fired[:] = 10, 10
        state.last_fired[7] = 0
        state.weights[name][7] = 99.0
        assert resample(state, Rows(x[:512]), x[:512].square().sum(1)) == 1
        length = state.weights["w_enc"][7].norm()
        assert float(state.weights[name][7]) == pytest.approx(
            float(sign * state.schedule.first_limit * length), rel=1e-5
        )


SHORT = dict(features=64, batch=256, tokens=25_600, log_every=10, progress=False)


class TestCollapse:
    def schedule(self, architecture="relu", k=None, **settings):
        config = TrainConfig(tokens=10_000, batch=10, **settings)
        return Schedule(SaeConfig(8, 16, architecture, k=k), config)

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            (dict(l0=0.49), r"L0 0.49 \(expected >= 0.5\)"),
            (dict(dead=0.91), r"dead 91.0% \(expected <= 90%\)"),
            (dict(fvu=0.96), r"fvu 0.96 \(expected <= 0.95\)"),
        ],
    )
    def test_each_limit(self, wrong, message):
        good = dict(step=101, l0=0.51, dead=0.89, fvu=0.94)
        schedule = self.schedule(sparsity=7.0)
        assert collapsed(good, schedule) == ""
        assert collapsed({**good, **wrong, "step": 100}, schedule) == ""  # a tenth of the run
        with pytest.warns(RuntimeWarning, match=f"step 101: .*{message}: lower sparsity, now 7"):
            CollapseWatch(schedule).look({**good, **wrong})

    def test_it_says_what_to_change(self):
        bad = dict(step=500, l0=0.0, dead=1.0, fvu=1.0)
        assert "raise l0, now 4" in collapsed(bad, self.schedule())
        assert "check that the rows vary" in collapsed(bad, self.schedule("topk", k=2))
        late = self.schedule(sparsity=1.0, sparsity_warmup=0.6)
        assert collapsed(bad, late) == "" and collapsed({**bad, "step": 601}, late)
        short = Schedule(SaeConfig(8, 16, "relu"), TrainConfig(tokens=600, batch=10))
        assert collapsed({**bad, "step": 50}, short) == "" and collapsed({**bad, "step": 51}, short)

    def test_a_run_says_so_once_and_notes_it(self, tmp_path):
        x, _ = rows(100_000, 24, 64, 4)
        with pytest.warns(RuntimeWarning, match="collapsed") as caught:
            train([x], tmp_path, architecture="relu", sparsity=500.0, **SHORT)
        assert len([w for w in caught if "collapsed" in str(w.message)]) == 1
        kept = Sae.load(tmp_path / "sae.safetensors").provenance.extra
        assert "lower sparsity" in kept["collapsed"]

    @pytest.mark.parametrize("settings", [dict(k=4), *(s for s, _ in PENALISED.values())], ids=str)
    def test_a_healthy_run_says_nothing(self, settings, tmp_path):
        x, _ = rows(100_000, 24, 64, 4)
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            sae = train([x], tmp_path, **settings, **SHORT)
        assert "collapsed" not in sae.provenance.extra


def test_runs_of_before_noted_a_penalty_with_a_selection(tmp_path):
    x, _ = rows(100_000, 24, 64, 4)
    settings = dict(architecture="topk", k=4, **SHORT)
    first = train([x], tmp_path, **settings)
    record = json.loads((tmp_path / "run.json").read_text())
    record["train"]["sparsity"] = 5.0
    for name in ("l0", "threshold_lr"):
        record["train"].pop(name)
    (tmp_path / "run.json").write_text(json.dumps(record))
    assert torch.equal(train([x], tmp_path, **settings).w_dec, first.w_dec)
