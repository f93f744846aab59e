# SPDX-License-Identifier: Apache-2.0
"""Parts of training on their own: schedules, first weights, dead features, thresholds, metrics."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae.oracle import planted
from sidechain.ops import Encoder, topk_encode
from sidechain.sae import Codes, Normaliser, Rows, SaeConfig, TrainConfig
from sidechain.sae.architectures.dead import dead_codes
from sidechain.sae.initialise import geometric_median, random_rows
from sidechain.sae.training.groups import by_level
from sidechain.sae.training.resample import resample
from sidechain.sae.training.state import TrainState
from sidechain.sae.training.step import train_step
from sidechain.sae.training.train_config import Schedule, default_batch
from sidechain.sae.training.train_metrics import Metrics

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
        long = self.schedule(lr=None, decay="constant", warmup=0.0, tokens=10**9)
        assert long.lr(10**6) == pytest.approx(2e-4 / math.sqrt(F / 2**14))
        short = self.schedule(lr=None, decay="constant", tokens=50_000)
        assert short.lr(2500) == pytest.approx(100 / (5000 * math.sqrt(D)))
        assert self.schedule(lr=None, decay="constant", tokens=200).lr(10) == 0.01
        wide = Schedule(SaeConfig(1024, 4096, k=4), TrainConfig(tokens=5000, batch=10))
        assert wide.lr(100) == pytest.approx(1 / 8 / math.sqrt(1024))

    def test_batch(self):
        for tokens, batch in ((10**8, 4096), (1 << 20, 1024), (300_000, 256), (100_000, 256)):
            assert TrainConfig(tokens=tokens).batch == batch == default_batch(tokens)
        assert TrainConfig(tokens=10**6, batch=4096).batch == 4096

    def test_k(self):
        annealed = self.schedule(k=4, k_start=24, k_anneal=0.5)
        assert [annealed.k(t) for t in (0, 25, 49, 50, 99)] == [24, 14, 4, 4, 4]
        assert self.schedule(k=4).k(0) == 4

    def test_sparsity(self):
        warm = self.schedule("relu", k=None, sparsity=2.0, sparsity_warmup=0.5)
        assert [warm.sparsity(t) for t in (0, 24, 49, 99)] == pytest.approx([0.04, 1.0, 2.0, 2.0])

    def test_defaults_by_penalty(self):
        assert self.schedule("jumprelu", k=None).bandwidth == 2.0
        assert self.schedule("jumprelu", k=None, penalty="l0").bandwidth == 1.0

    def test_defaults_of_penalised_architectures(self):
        usual = self.schedule("jumprelu", k=None)
        assert usual.l0 == F / 4  # less than 32
        above = 0.5 * math.erfc(usual.first_limit / math.sqrt(2))  # P(z > limit), z standard normal
        assert above == pytest.approx(1 / 4)
        assert self.schedule("jumprelu", k=None, threshold_init=0.3).first_limit == 0.3
        assert self.schedule("relu", k=None, l0=2.5).l0 == 2.5
        assert self.schedule("relu", k=None, sparsity=1.0).l0 is None
        assert self.schedule().l0 is None
        wide = Schedule(SaeConfig(D, 4096, "relu"), TrainConfig(tokens=1000, batch=10))
        assert wide.l0 == 32

    def test_learning_rate_of_thresholds(self):
        short = self.schedule("jumprelu", k=None, tokens=5000, lr=1e-4, decay_share=0.5, warmup=0)
        assert [short.threshold_lr(t) for t in (0, 375)] == pytest.approx([0.03, 0.015])
        longer = self.schedule("jumprelu", k=None, tokens=10**6, lr=1e-4, warmup=0)
        assert longer.threshold_lr(0) == pytest.approx(20 / 10**5)
        assert self.schedule("jumprelu", k=None, lr=0.5, warmup=0).threshold_lr(0) == 0.5
        own = self.schedule("jumprelu", k=None, lr=1e-4, threshold_lr=0.02, warmup=0)
        assert own.threshold_lr(0) == pytest.approx(0.02)

    def test_paths(self):
        assert self.schedule().fused and self.schedule("batch_topk").fused
        assert not self.schedule(path="autograd").fused
        assert self.schedule("matryoshka").fused
        deep = SaeConfig(D, F, "matryoshka", k=4, prefixes=(*range(1, 17), F))
        assert not Schedule(deep, TrainConfig(tokens=1000, batch=10)).fused
        with pytest.raises(NotImplementedError, match="most 16 prefixes and path"):
            Schedule(deep, TrainConfig(tokens=1000, batch=10, path="fused"))

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
            (dict(l0=4), ValueError, r"no l0 with architecture='topk' \[k says"),
            (dict(architecture="gated", k=None, l0=F), ValueError, "l0 < 48"),
            (dict(architecture="relu", k=None, l0=4, sparsity=1.0), ValueError, "l0 or sparsity"),
            (dict(architecture="relu", k=None, l0=0.0), ValueError, "l0 above 0"),
            (dict(architecture="relu", k=None, sparsity=-1.0), ValueError, "sparsity between 0"),
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
        state.update_dead()
        assert torch.isin(torch.arange(0, F, 4), state.dead).all()
        before = {n: t.clone() for n, t in state.weights.items()}
        train_step(state, Rows(x))
        for name in ("w_enc", "w_dec", "b_enc"):
            moved = (state.weights[name] - before[name]).reshape(F, -1).norm(dim=1)[::4]
            assert (moved > 0).sum() >= 8, name

    @pytest.mark.parametrize("tile", [1, 200, 1 << 22])
    @pytest.mark.parametrize("k", [5, 40])
    def test_dead_codes_are_those_of_the_encoder(self, k, tile, monkeypatch):
        state = make()
        state.dead = torch.arange(0, F, 3)
        state.weights["b_enc"].uniform_(-0.3, 0.3)
        x, _ = planted(N, D, 24)
        x[3, 2] = torch.nan
        w = {**state.weights, "b_pre": state.b_pre + 0.1}
        compact = {**w, "w_enc": w["w_enc"][state.dead]}
        monkeypatch.setattr("sidechain.sae.architectures.dead._TILE", tile)
        codes = dead_codes(state, k, x, compact)
        width = min(k, len(state.dead))
        encoder = Encoder(compact["w_enc"], w["b_enc"][state.dead], w["b_pre"])
        wanted = topk_encode(x, encoder, k=width)
        assert codes.values.shape == wanted.values.shape
        order = codes.values.sort(dim=1, descending=True, stable=True).indices
        torch.testing.assert_close(codes.values.gather(1, order), wanted.values, equal_nan=True)
        finite = torch.arange(N) != 3
        found = codes.indices.gather(1, order)[finite]
        assert torch.equal(found, wanted.indices[finite])

    @pytest.mark.parametrize("path", ["fused", "autograd"])
    def test_aux_k_revives(self, path):
        """Features that start dead come alive with it and stay dead without."""
        x, _ = planted(N, D, 24)
        left = {}
        for aux_k in (0, 8):
            state = self.dead_state(path, aux_k=aux_k, aux_weight=1.0)
            for _ in range(90):
                train_step(state, Rows(x))
            left[aux_k] = int(state.dead_mask()[::4].sum())
        assert left[8] < left[0] == F // 4

    def test_resampling(self):
        state = make("relu", k=None, dead_tokens=N * 2)
        x, _ = planted(N, D, 24)
        state.step, state.last_fired[:] = 10, 10
        state.last_fired[[3, 7, 40]] = 2
        for statistics in state.adam.values():
            for statistic in statistics:
                statistic.fill_(1.0)
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
            assert all(m[chosen].abs().sum() == 0 for m in state.adam[name])
            assert all((m[kept] == 1).all() for m in state.adam[name])
        assert int(state.dead_mask().sum()) == 0
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


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(0, 7),
    sizes=st.sets(st.integers(1, 29), max_size=4),
    first=st.integers(0, 20),
    seed=st.integers(0, 99),
)
def test_levels_cut_rows_at_the_prefixes(rows, sizes, first, seed):
    """Every code lies in the list of its row and level, wherever codes of others were blanked."""
    g = torch.Generator().manual_seed(seed)
    prefixes = (*sorted(sizes), 30)
    active = torch.rand(rows, 30 - first, generator=g) < 0.4
    row, indices = active.nonzero().T
    offsets = torch.nn.functional.pad(active.sum(1).cumsum(0), (1, 0))
    blank = torch.rand(len(indices), generator=g) < 0.3
    blanked = torch.where(blank, -1, indices.int())
    codes = Codes(torch.rand(len(indices), generator=g), blanked, offsets)
    cut = by_level(codes, torch.tensor(prefixes), first).offsets
    assert len(cut) == rows * len(prefixes) + 1
    for place in range(len(cut) - 1):
        for entry in range(int(cut[place]), int(cut[place + 1])):
            n, level = divmod(place, len(prefixes))
            assert row[entry] == n
            low = 0 if level == 0 else prefixes[level - 1]
            assert blank[entry] or low <= indices[entry] + first < prefixes[level]
    assert cut[0] == 0 and cut[-1] == len(indices) and bool((cut.diff() >= 0).all())


def test_levels_need_lists():
    with pytest.raises(TypeError, match="expected codes in CSR form"):
        by_level(Codes(torch.zeros(2, 3), torch.zeros(2, 3).int(), None), torch.tensor([4, 8]), 0)


@pytest.mark.parametrize("architecture", ["batch_topk", "matryoshka"])
def test_both_paths_take_the_same_steps(architecture):
    """Trained side by side: weights apart by rounding alone, and the same features fire."""
    x, _ = planted(12 * N, D, 24)
    both = [make(architecture, path=path, lr=1e-3, aux_k=0) for path in ("fused", "autograd")]
    for part in x.split(N):
        losses = [train_step(state, Rows(part)).row_loss for state in both]
        torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
    fused, autograd = both
    assert torch.equal(fused.last_fired, autograd.last_fired)
    for name, value in autograd.weights.items():
        torch.testing.assert_close(fused.weights[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ["batch_topk", "matryoshka"])
def test_where_the_screen_starts_changes_no_bit(architecture):
    """With the last batch's smallest value, with none, and with one that is far too large."""
    x, _ = planted(8 * N, D, 24)
    runs = [make(architecture, lr=1e-2, warmup=0.0, aux_k=0) for _ in range(3)]
    for part in x.split(N):
        for state, smallest in zip(runs, ("last", None, 1e3), strict=True):
            if smallest != "last":
                state.smallest = None if smallest is None else torch.tensor(smallest)
            train_step(state, Rows(part))
    assert float(runs[0].smallest) > 0
    for other in runs[1:]:
        for (name, value, _), (_, found, _) in zip(
            runs[0].named(), other.named(), strict=True
        ):  # fmt: skip
            assert torch.equal(value, found), name


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
    def test_values(self):
        state = make()
        metrics = Metrics(state)
        x, _ = planted(3 * N, D, 24)
        squares = torch.zeros(())
        for part in x.split(N):
            outcome = train_step(state, Rows(part))
            squares += outcome.row_loss.sum()
            metrics.add(outcome)
        assert metrics.read() is None
        found = metrics.flush()
        assert found["step"] == 3 and found["tokens"] == 3 * N and found["k"] == 3
        variance = (x - x.mean(0)).square().sum()
        assert found["fvu"] == pytest.approx(float(squares / variance), rel=1e-5)
        assert found["l0"] == pytest.approx(3.0)
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
