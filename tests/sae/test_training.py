# SPDX-License-Identifier: Apache-2.0
"""Parts of training on their own: schedules, first weights, dead features, thresholds, metrics."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae.oracle import planted
from sidechain.sae import Normaliser, Rows, SaeConfig, TrainConfig
from sidechain.sae.init import encoder_scale, geometric_median, random_rows
from sidechain.sae.metrics import Metrics
from sidechain.sae.resample import resample
from sidechain.sae.state import TrainState
from sidechain.sae.step import train_step
from sidechain.sae.train_config import Schedule

D, F, N = 16, 48, 64


def make(architecture="topk", k=3, **train):
    shape = SaeConfig(D, F, architecture, k=k)
    return TrainState(shape, TrainConfig(tokens=N * 100, batch=N, **train), Normaliser.identity(D))


class TestSchedule:
    def schedule(self, architecture="topk", k=4, **train):
        train = {"tokens": 1000, "batch": 10, "lr": 1.0, **train}
        return Schedule(SaeConfig(D, F, architecture, k=k), TrainConfig(**train))

    def test_lr(self):
        linear = self.schedule(warmup=0.1, decay_share=0.5)
        assert [linear.lr(t) for t in (0, 4, 9, 10, 50, 75, 99)] == pytest.approx(
            [0.1, 0.5, 1.0, 1.0, 1.0, 0.5, 0.02]
        )
        cosine = self.schedule(warmup=0.0, decay="cosine", decay_share=0.5)
        assert cosine.lr(75) == pytest.approx(0.5)
        assert cosine.lr(60) == pytest.approx(0.5 - 0.5 * math.cos(math.pi * 0.8))
        assert self.schedule(decay="constant").lr(99) == 1.0
        assert self.schedule(lr=None, decay="constant").lr(99) == pytest.approx(
            2e-4 / math.sqrt(F / 2**14)
        )

    def test_k(self):
        annealed = self.schedule(k=4, k_start=24, k_anneal=0.5)
        assert [annealed.k(t) for t in (0, 25, 49, 50, 99)] == [24, 14, 4, 4, 4]
        assert self.schedule(k=4).k(0) == 4

    def test_sparsity(self):
        warm = self.schedule("relu", k=None, sparsity=2.0, sparsity_warmup=0.5)
        assert [warm.sparsity(t) for t in (0, 24, 49, 99)] == pytest.approx([0.04, 1.0, 2.0, 2.0])

    def test_defaults_by_penalty(self):
        tanh = self.schedule("jumprelu", k=None)
        assert (tanh.bandwidth, tanh.threshold_init) == (2.0, 0.1)
        count = self.schedule("jumprelu", k=None, penalty="l0")
        assert count.bandwidth == count.threshold_init == pytest.approx(0.001 * math.sqrt(D))

    def test_paths(self):
        assert self.schedule().fused and self.schedule("batch_topk").fused
        assert not self.schedule(path="autograd").fused
        assert not self.schedule("matryoshka").fused

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            (dict(architecture="relu", k=None, path="fused"), NotImplementedError, "path='fused'"),
            (dict(path="autograd", precision="int8"), NotImplementedError, "precision='fp32'"),
            (dict(path="autograd", bf16_moments=True), NotImplementedError, "bf16_moments=False"),
            (dict(k_start=2), ValueError, "k_start between 4 .* and 48"),
            (dict(architecture="relu", k=None, k_start=9), ValueError, "k_start between None"),
            (dict(multi_k=3), ValueError, "multi_k above 4"),
            (dict(architecture="batch_topk", multi_k=9), ValueError, "architecture='topk'"),
            (dict(resample=0.1, aux_k=3), ValueError, "either resample or aux_k"),
            (dict(tokens=5), ValueError, "tokens >= 10"),
            (dict(tokens=5.5), TypeError, "tokens as int"),
            (dict(warmup=1.5), ValueError, "warmup between 0 and 1"),
            (dict(lr=0.0), ValueError, "lr above 0"),
            (dict(lr="fast"), TypeError, "lr as a number"),
            (dict(decay="steps"), ValueError, "decay to be one of linear, cosine, constant"),
            (dict(betas=(0.9, 1.0)), ValueError, r"in \[0, 1\), got 1.0"),
        ],
    )
    def test_bad_settings(self, changes, error, message):
        with pytest.raises(error, match=message):
            self.schedule(**changes)


class TestFirstWeights:
    @settings(max_examples=20, deadline=None)
    @given(st.integers(0, 3000), st.integers(1, 200), st.integers(0, 5))
    def test_rows_do_not_depend_on_how_the_table_is_cut(self, start, count, seed):
        whole = random_rows(seed, 0, 0, 3200, 4)
        assert torch.equal(random_rows(seed, 0, start, start + count, 4), whole[start:][:count])
        assert not torch.equal(random_rows(seed, 1, start, start + count, 4), whole[start:][:count])
        torch.testing.assert_close(whole.norm(dim=1), torch.ones(3200))

    def test_encoder_scale_reconstructs(self):
        rows = random_rows(0, 0, 0, 4096, 32)
        scale = encoder_scale(32, 4096, selecting=False)
        x = torch.randn(500, 32)
        x_hat = (scale * x @ rows.T).relu() @ rows
        assert float((x_hat * x).sum() / x.square().sum()) == pytest.approx(1.0, abs=0.05)
        assert encoder_scale(32, 40, selecting=False) == 1.0

    def test_geometric_median(self):
        x = torch.randn(400, 5, dtype=torch.float64) + 3
        x[:40] += 1000  # a tenth of outliers moves the mean, not the median
        found = geometric_median(x)
        assert float((found - 3).norm()) < 0.5 < float((x.mean(0) - 3).norm())
        pull = (x - found) / (x - found).norm(dim=1, keepdim=True)
        assert float(pull.sum(0).norm()) < 0.05 * len(x)

    @pytest.mark.parametrize("kind", ["mean", "geometric_median", "zero"])
    def test_biases_start_in_the_middle(self, kind):
        state = make(bias_init=kind)
        x = torch.randn(N, D) + 5
        state.start_biases(Rows(x))
        middle = {"mean": x.mean(0), "geometric_median": geometric_median(x)}
        torch.testing.assert_close(state.b_pre, middle.get(kind, torch.zeros(D)))


class TestDeadFeatures:
    def dead_state(self, path, **train):
        state = make(path=path, dead_tokens=N * 2, dead_every=3, lr=1e-2, warmup=0.0, **train)
        state.weights["w_enc"][::4] *= 1e-2
        return state

    @pytest.mark.parametrize("path", ["fused", "autograd"])
    def test_aux_k_reaches_the_encoder(self, path):
        """What peers get wrong: without a gradient there, a dead encoder row stays as it is."""
        x, _ = planted(N, D, 24)
        state = self.dead_state(path, aux_k=8)
        for _ in range(3):
            train_step(state, Rows(x))
        state.look_for_dead()
        assert torch.isin(torch.arange(0, F, 4), state.dead).all()
        before = {n: t.clone() for n, t in state.weights.items()}
        train_step(state, Rows(x))
        for name in ("w_enc", "w_dec", "b_enc"):
            moved = (state.weights[name] - before[name]).reshape(F, -1).norm(dim=1)[::4]
            assert (moved > 0).sum() >= 8, name

    @pytest.mark.parametrize("path", ["fused", "autograd"])
    def test_aux_k_revives(self, path):
        """Features that start dead come alive with it and stay dead without."""
        x, _ = planted(N, D, 24)
        left = {}
        for aux_k in (0, 8):
            state = self.dead_state(path, aux_k=aux_k, aux_weight=1.0)
            for _ in range(90):
                train_step(state, Rows(x))
            left[aux_k] = int(state.silent()[::4].sum())
        assert left[8] < left[0] == F // 4

    def test_resampling(self):
        state = make("relu", k=None, dead_tokens=N * 2)
        x, _ = planted(N, D, 24)
        state.step, state.last_fired[:] = 10, 10
        state.last_fired[[3, 7, 40]] = 2
        for moments in state.moments.values():
            for moment in moments:
                moment.fill_(1.0)
        before = {n: t.clone() for n, t in state.weights.items()}
        loss = torch.zeros(N)
        loss[[5, 9, 21]] = torch.tensor([1.0, 2.0, 3.0])  # the only rows that can be drawn
        assert resample(state, Rows(x), loss) == 3
        chosen, kept = torch.tensor([3, 7, 40]), torch.ones(F, dtype=bool)
        kept[chosen] = False
        w_dec, w_enc = state.weights["w_dec"][chosen], state.weights["w_enc"][chosen]
        directions = x[[5, 9, 21]] / x[[5, 9, 21]].norm(dim=1, keepdim=True)
        cosine = w_dec @ directions.T
        assert sorted(cosine.argmax(1).tolist()) == [0, 1, 2]
        torch.testing.assert_close(cosine.max(1).values, torch.ones(3))
        length = before["w_enc"][kept].norm(dim=1).mean()
        torch.testing.assert_close(w_enc, 0.2 * length * w_dec)
        for name in ("w_enc", "w_dec", "b_enc"):
            assert torch.equal(state.weights[name][kept], before[name][kept])
            assert all(m[chosen].abs().sum() == 0 for m in state.moments[name])
            assert all((m[kept] == 1).all() for m in state.moments[name])
        assert int(state.silent().sum()) == 0
        assert resample(state, Rows(x), loss) == 0

    def test_resampling_with_more_dead_than_rows(self):
        state = make("relu", k=None, dead_tokens=N)
        state.step = 50
        assert resample(state, Rows(planted(N, D, 24)[0]), torch.arange(N).float()) == F
        state.last_fired.zero_()
        loss = torch.zeros(N)
        loss[:5] = 1.0
        assert resample(state, Rows(planted(N, D, 24)[0]), loss) == 5

    def test_resampling_happens_on_time_and_not_at_the_end(self):
        state = make("relu", k=None, resample=0.1)
        due = [t for t in range(100) if state.schedule.resamples(t)]
        assert due == [9, 19, 29, 39, 49, 59, 69]


@pytest.mark.parametrize("path", ["fused", "autograd"])
def test_running_threshold_keeps_k_features_on_average(path):
    x, _ = planted(20 * N, D, 24)
    state = make("batch_topk", path=path, lr=1e-3, threshold_decay=0.9, aux_k=0)
    for step in range(60):
        train_step(state, Rows(x[step % 20 * N :][:N]))
    sae = state.to_sae()
    count = sae.encode(x).values.shape[0] / len(x)
    assert count == pytest.approx(3.0, rel=0.1)


class TestMetrics:
    def test_figures(self):
        state = make()
        metrics = Metrics(state)
        x, _ = planted(3 * N, D, 24)
        squares = torch.zeros(())
        for part in x.split(N):
            outcome = train_step(state, Rows(part))
            squares += outcome.row_loss.sum()
            metrics.add(outcome)
        assert metrics.read() is None
        figures = metrics.flush()
        assert figures["step"] == 3 and figures["tokens"] == 3 * N and figures["k"] == 3
        variance = (x - x.mean(0)).square().sum()
        assert figures["fvu"] == pytest.approx(float(squares / variance), rel=1e-5)
        assert figures["l0"] == pytest.approx(3.0)
        assert metrics.flush() is None
        metrics.add(train_step(state, Rows(x[:N])))
        assert metrics.read() is None and metrics.read()["step"] == 4

    def test_nothing_waits_for_the_device(self, monkeypatch):
        """A step reads no value back: `item`, `tolist`, `bool` and `nonzero` are out of reach."""

        def refused(self, *args, **kwargs):
            raise AssertionError("a step read a value back")

        for path in ("fused", "autograd"):
            state = make("topk", path=path, aux_k=0)
            metrics = Metrics(state)
            with monkeypatch.context() as patch:
                for name in ("item", "tolist", "__bool__", "__float__", "__int__", "nonzero"):
                    patch.setattr(torch.Tensor, name, refused)
                metrics.add(train_step(state, Rows(planted(N, D, 24)[0])))
                metrics.read()
