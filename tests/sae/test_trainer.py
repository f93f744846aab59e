# SPDX-License-Identifier: Apache-2.0
"""Runs: what they learn, what they write, and that they go on where they were cut off."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from sae.oracle import planted
from sidechain.cli import main as cli
from sidechain.sae import (
    IterableSource,
    Normaliser,
    PipelineSource,
    Rows,
    Sae,
    SaeConfig,
    StoreSource,
    TrainConfig,
    Trainer,
    train,
)
from sidechain.sae.training import checkpoint
from sidechain.sae.training.state import TrainState
from sidechain.sae.training.step import train_step
from sidechain.store import ActivationStore, ActivationWriter
from sidechain.testing import tiny_pipeline

D, F, N = 32, 64, 256
RECOVERY = {
    "topk": dict(architecture="topk", k=3),
    "topk, autograd": dict(architecture="topk", k=3, path="autograd"),
    "multi_topk": dict(architecture="topk", k=3, multi_k=9),
    "batch_topk": dict(architecture="batch_topk", k=3),
    "matryoshka": dict(architecture="matryoshka", k=3, prefixes=(48, 64)),
    "relu": dict(architecture="relu", sparsity=2.0),
    "gated": dict(architecture="gated", sparsity=4.0),
    "jumprelu, tanh": dict(architecture="jumprelu", l0=3),
    "jumprelu, l0": dict(
        architecture="jumprelu", penalty="l0", sparsity=1.0, bandwidth=0.5, threshold_init=0.3
    ),
}


def similarity(sae, directions):
    """Mean over the planted directions of the best cosine with a decoder row."""
    rows = sae.w_dec.detach()
    return float((directions @ (rows / rows.norm(dim=1, keepdim=True)).T).max(1).values.mean())


@pytest.mark.parametrize("case", RECOVERY)
def test_planted_dictionary_is_recovered(case, tmp_path):
    x, directions = planted(20_000, D)
    sae = train(
        lambda: itertools.repeat(x), tmp_path, features=F, tokens=N * 800, batch=N, lr=3e-3,
        progress=False, **RECOVERY[case],
    )  # fmt: skip
    assert similarity(sae, directions) >= 0.95 > 0.3 + similarity(Sae(sae.config), directions)
    with torch.no_grad():
        left = (sae(x) - x).square().sum() / (x - x.mean(0)).square().sum()
    assert float(left) < 0.25
    assert sae.provenance.metrics["fvu"] == pytest.approx(float(left), abs=0.03)


# -- going on -------------------------------------------------------------------------------------


def make_store(folder, rows=6000, sites=("cross:1",), widths=(D,)):
    generator = torch.Generator().manual_seed(5)
    x, _ = planted(rows, D, seed=5)
    mixing = {w: torch.eye(D) if w == D else torch.randn(D, w, generator=generator) for w in widths}
    with ActivationWriter(folder, dict(zip(sites, widths, strict=True)), mode="create") as writer:
        writer.set_grid([900.0, 500.0, 100.0])
        for step, scale in enumerate((8.0, 2.0, 0.5)):
            part = x[step::3] * scale + step
            found = {site: part @ mixing[w] for site, w in zip(sites, widths, strict=True)}
            writer.write(found, step=step, branch="cond", prompt=0)
    return folder


SHORT = dict(features=F, tokens=N * 60, batch=N, lr=3e-3, progress=False, log_every=5)


class Cut(Exception):
    pass


def same_run(a, b):
    left, right = Sae.load(a / "sae.safetensors"), Sae.load(b / "sae.safetensors")
    ours, theirs = left.state_dict(), right.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name
    lines = [
        [{k: v for k, v in json.loads(line).items() if k != "tokens_per_s"} for line in text]
        for text in ((p / "metrics.jsonl").read_text().splitlines() for p in (a, b))
    ]
    assert lines[0] == lines[1]


@pytest.mark.parametrize(
    "settings",
    [
        dict(architecture="batch_topk", k=4, aux_k=8, dead_tokens=N * 3, dead_every=7),
        dict(architecture="topk", k=4, k_start=16, resample=0.2, dead_tokens=N * 3),
        dict(architecture="jumprelu"),
        dict(architecture="topk", k=4, bf16_moments=True),
        dict(architecture="matryoshka", k=4, aux_k=8, dead_tokens=N * 3, dead_every=7),
    ],
    ids=["batch_topk aux", "topk resampled", "jumprelu", "bf16 moments", "matryoshka aux"],
)
def test_cut_off_anywhere_and_continued(settings, tmp_path, monkeypatch):
    folder = make_store(tmp_path / "store")
    settings = {**SHORT, **settings, "checkpoint_minutes": 0.0}
    train(folder, tmp_path / "whole", **settings)
    real, left = train_step, [0]

    def cut(state, rows):
        left[0] -= 1
        if left[0] < 0:
            raise Cut
        return real(state, rows)

    monkeypatch.setattr("sidechain.sae.training.trainer.train_step", cut)
    for steps in (3, 9, 26, 12, 1000):
        left[0] = steps
        try:
            train(folder, tmp_path / "parts", **settings)
        except Cut:
            continue
    (last,) = (tmp_path / "parts" / "checkpoints").iterdir()  # the end: a reason may add steps
    assert last.name == "step-000000060"
    same_run(tmp_path / "whole", tmp_path / "parts")


def metrics(out):
    path = out / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


class TestCheckpoints:
    def state(self, **settings):
        config = SaeConfig(D, F, "batch_topk", k=4)
        made = TrainConfig(tokens=N * 8, batch=N, **settings)
        return TrainState(config, made, Normaliser.identity(D))

    def trained(self, steps):
        state = self.state()
        x, _ = planted(N, D)
        for _ in range(steps):
            train_step(state, Rows(x))
        return state

    def test_round_trip(self, tmp_path):
        state, other = self.trained(3), self.state(seed=9)
        checkpoint.save(tmp_path, state, {})
        found = checkpoint.latest(tmp_path)
        checkpoint.load(found, other)
        assert other.step == 3
        for (name, ours, _), (_, theirs, _) in zip(state.named(), other.named(), strict=True):
            assert torch.equal(ours, theirs), name

    @pytest.mark.parametrize("how", ["flipped bit", "cut short", "no manifest", "missing file"])
    def test_damage_is_named_and_the_one_before_is_used(self, how, tmp_path):
        checkpoint.save(tmp_path, self.trained(2), {})
        checkpoint.save(tmp_path, self.trained(4), {})
        file = next((tmp_path / "step-000000004").glob("features-*"))
        data = bytearray(file.read_bytes())
        if how == "flipped bit":
            data[-100] ^= 4
            file.write_bytes(data)
        elif how == "cut short":
            file.write_bytes(data[:-1])
        elif how == "no manifest":
            (tmp_path / "step-000000004" / "manifest.json").unlink()
        else:
            file.unlink()
        with pytest.warns(RuntimeWarning, match="step-000000004 left out"):
            assert checkpoint.latest(tmp_path).step == 2

    def test_a_write_that_fails_leaves_the_old_one(self, tmp_path, monkeypatch):
        checkpoint.save(tmp_path, self.trained(2), {})
        for name in ("os.replace", "safetensors.torch.save_file", "os.fsync"):
            with monkeypatch.context() as patch:
                patch.setattr(f"sidechain.sae.training.checkpoint.{name}", broken)
                with pytest.raises(OSError, match="no space"):
                    checkpoint.save(tmp_path, self.trained(4), {})
            assert checkpoint.latest(tmp_path).step == 2
        checkpoint.save(tmp_path, self.trained(4), {})
        assert checkpoint.latest(tmp_path).step == 4
        assert not list(tmp_path.glob(".*"))


def broken(*_, **__):
    raise OSError("no space left on device")


# -- sources --------------------------------------------------------------------------------------


class TestSources:
    def rows(self, source, start, count, batch=64):
        from sidechain.sae import Mesh

        found = source.batches(batch, start, Mesh(), torch.device("cpu"))
        return list(itertools.islice(found, count))

    def same(self, ours, theirs):
        for a, b in zip(ours, theirs, strict=True):
            for left, right in zip(a, b, strict=True):
                assert (left is None) == (right is None)
                assert left is None or torch.equal(left, right)

    def test_store_goes_on_at_any_batch_over_epochs(self, tmp_path):
        source = StoreSource(ActivationStore(make_store(tmp_path / "s", 600), "cross:1"))
        every = self.rows(source, 0, 25)
        self.same(every[13:], self.rows(source, 13, 12))
        first = torch.cat([r.x for r in every[:9]])  # an epoch is 600 // 64 = 9 batches
        assert len(first.unique(dim=0)) == len(first)

    def test_store_normalises_every_step(self, tmp_path):
        store = ActivationStore(make_store(tmp_path / "s"), "cross:1")
        source = StoreSource(store)
        table, target = source.normalisers("step", centre=True)
        assert target is None and table.steps.tolist() == [0, 1, 2]
        assert table.timesteps.tolist() == [900.0, 500.0, 100.0]
        rows = torch.arange(len(store))
        y = table.normalise(store.read(rows), store.labels(rows).step)
        for step in range(3):
            mine = y[store.labels(rows).step == step]
            torch.testing.assert_close(mine.mean(0), torch.zeros(D), atol=1e-3, rtol=0)
            assert float(mine.square().mean()) == pytest.approx(1.0, abs=1e-3)
        plain, _ = source.normalisers("global", centre=False)
        assert len(plain.scale) == 1 and plain.mean.abs().sum() == 0
        y = plain.normalise(store.read(rows))
        assert float(y.square().mean()) == pytest.approx(1.0, abs=1e-3)
        assert source.normalisers("none", centre=True)[0].is_identity

    def test_transcoder_from_two_sites(self, tmp_path):
        folder = make_store(tmp_path / "s", sites=("a", "b"), widths=(D, 20))
        source = StoreSource(ActivationStore(folder, "a"), ActivationStore(folder, "b"))
        settings = {**SHORT, "tokens": N * 400}
        sae = train(source, tmp_path / "run", architecture="topk", k=6, **settings)
        assert sae.config.transcoder and sae.config.width_out == 20
        assert (sae.provenance.site, sae.provenance.target_site) == ("a", "b")
        a, b = (ActivationStore(folder, site) for site in "ab")
        rows = torch.arange(len(a))
        step = a.labels(rows).step
        with torch.no_grad():
            error = sae(a.read(rows).float(), step=step) - b.read(rows).float()
            error = error / sae.target_normaliser.scale[step][:, None]
        assert float(error.square().mean()) < 0.35
        assert sae.provenance.metrics["fvu"] == pytest.approx(float(error.square().mean()), abs=0.1)

    def test_stores_of_other_rows_make_no_transcoder(self, tmp_path):
        a = ActivationStore(make_store(tmp_path / "a", 600), "cross:1")
        b = ActivationStore(make_store(tmp_path / "b", 300), "cross:1")
        with pytest.raises(ValueError, match="expected the same rows"):
            StoreSource(a, b)

    def test_iterables(self):
        x = torch.randn(10, 7, D)
        whole = x.reshape(-1, D)
        for items in (list(x), iter(x), lambda: iter(x), [x[:3], x[3:]]):
            source = IterableSource(items)
            assert source.widths() == (D, D)
            source.normalisers("global", centre=True)
            got = torch.cat([r.x for r in self.rows(source, 1, 9, batch=20)])
            assert torch.equal(got, whole[20:60])

    def test_iterables_with_steps(self):
        items = [(torch.randn(5, D), 3), (torch.randn(5, D), torch.full((5,), 8))]
        source = IterableSource(items)
        table, _ = source.normalisers("step", centre=True)
        assert table.steps.tolist() == [3, 8]
        (rows,) = self.rows(source, 0, 1, batch=10)
        assert rows.step.tolist() == [3] * 5 + [8] * 5

    @pytest.mark.parametrize(
        ("items", "error", "message"),
        [
            ([], ValueError, "at least one item"),
            ([torch.zeros(3, 2, dtype=torch.int64)], TypeError, "expected float16, .* got int64"),
            (["text"], TypeError, "expected tensors or arrays .*got str"),
            ([(torch.zeros(3, D), torch.zeros(2).long())], ValueError, "expected 3 steps"),
            ([(torch.zeros(3, D), torch.zeros(3))], TypeError, "expected whole steps"),
            ([[torch.zeros(3, D), torch.zeros(3)]], TypeError, "got a list of 2"),
        ],
    )
    def test_bad_items(self, items, error, message):
        with pytest.raises(error, match=message):
            IterableSource(items).widths()

    def test_pipeline(self):
        prompts = [f"a {w} song" for w in ("sad", "happy", "slow", "fast", "piano")]

        def make():
            return PipelineSource(
                tiny_pipeline(), "cross:1", prompts, target="cross:2", buffer=100, batch_size=2,
                num_inference_steps=3, audio_end_in_s=1.0,
            )  # fmt: skip

        source = make()
        table, target = source.normalisers("step", centre=True)
        assert table.steps.tolist() == [0, 1, 2] == target.steps.tolist()
        every = self.rows(source, 0, 9, batch=16)
        self.same(every[7:], self.rows(make(), 7, 2, batch=16))
        assert every[0].x.shape == (16, source.widths()[0])
        assert not torch.equal(every[0].x, every[0].target)
        assert set(every[0].step.tolist()) <= {0, 1, 2}

    def test_training_on_a_pipeline(self, tmp_path):
        source = PipelineSource(
            tiny_pipeline("music"), "cross:1", ["a sad song", "a happy song"], buffer=256,
            batch_size=2, num_inference_steps=2,
        )  # fmt: skip
        settings = dict(features=32, k=4, tokens=64 * 30, batch=64, progress=False)
        sae = train(source, tmp_path, **settings)
        assert sae.provenance.site == "cross:1" and sae.provenance.source == "generation"
        assert sae.normaliser.timesteps is not None
        assert sae.provenance.tokens == 64 * 30
        again = train(source, tmp_path, **settings)  # finished: only read
        assert torch.equal(again.w_enc, sae.w_enc)


# -- bad runs -------------------------------------------------------------------------------------


class TestRefused:
    def test_a_folder_of_another_run(self, tmp_path):
        x, _ = planted(600, D)
        settings = {**SHORT, "tokens": N * 2, "k": 4}
        train([x], tmp_path, **settings)
        with pytest.raises(ValueError, match=r"expected lr=0.003 \[the run in .*\], got 0.01"):
            train([x], tmp_path, **{**settings, "lr": 0.01})

    def test_widths(self, tmp_path):
        source = IterableSource([torch.randn(4, 5)])
        with pytest.raises(ValueError, match="expected rows of widths 32 and 32"):
            Trainer(SaeConfig(D, F, k=3), TrainConfig(tokens=8, batch=4), source, tmp_path)

    def test_loggers(self, tmp_path):
        source = IterableSource([torch.randn(4, D)])
        config, settings = SaeConfig(D, F, k=3), TrainConfig(tokens=8, batch=4)
        with pytest.raises(ValueError, match="expected loggers of tensorboard, wandb"):
            Trainer(config, settings, source, tmp_path, loggers=["paper"])


class TestCommand:
    def run(self, *arguments):
        return cli.main(["sae", "train", *map(str, arguments)])

    def test_store(self, tmp_path, capsys):
        folder = make_store(tmp_path / "store")
        out = tmp_path / "run"
        line = (folder, "--features", "2x", "--k", "4", "--tokens", "5000", "--batch", "256",
                "--set", "log_every=5", "--set", "betas=[0.9,0.99]", "--out", out)  # fmt: skip
        assert self.run(*line) == 0
        assert capsys.readouterr().out.strip() == str(out / "sae.safetensors")
        sae = Sae.load(out / "sae.safetensors")
        assert sae.config == SaeConfig(D, 2 * D, "batch_topk", k=4)
        assert sae.provenance.site == "cross:1" and sae.provenance.branches == ("cond",)
        assert sae.provenance.extra["train"]["betas"] == [0.9, 0.99]
        lines = metrics(out)
        assert [json.loads(line)["step"] for line in lines] == [5, 10, 15, 19]
        assert {"fvu", "l0", "dead", "tokens_per_s", "lr"} <= json.loads(lines[0]).keys()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["cross:1"], "or --prompts FILE beside a site, got 'cross:1' alone"),
            (["no/where"], "expected manifest.json in no/where"),
            (["STORE", "--site", "cross:9"], "cross:9"),
            (["STORE", "--k", "0"], "--k: expected at least 1, got 0"),
            (["STORE", "--k", "999"], "expected 1 <= k <= 256"),
            (["STORE", "--features", "many"], "--features: expected N or Nx, got 'many'"),
            (["STORE", "--architecture", "relu", "--k", "3"], "expected no k"),
            (["STORE", "--set", "wings=2"], "--set: expected NAME=VALUE"),
            (["STORE", "--set", "clip=-1"], "expected clip above 0"),
            (["STORE", "--set", "path=warp"], "expected path to be one of"),
            (["STORE", "--tokens", "7"], "expected tokens >= 256"),
            (["STORE", "--lr", "nan"], "--lr: expected a finite number"),
            (["STORE", "--batch", "100000", "--tokens", "200000"], "at least 100000 rows"),
            (["STORE", "--feature-slices", "2"], "expected feature slices that divide 1"),
            (["STORE", "--log", "paper"], "--log: expected tensorboard | wandb"),
        ],
    )
    def test_bad_input_is_one_line(self, arguments, message, tmp_path, capsys, monkeypatch):
        monkeypatch.chdir(tmp_path)
        make_store(tmp_path / "store", 600)
        line = [str(tmp_path / "store") if a == "STORE" else a for a in arguments]
        assert self.run(*line) == 2
        error = capsys.readouterr().err.strip()
        assert message in error.splitlines()[-1]
        assert error.splitlines()[-1].startswith("sidechain: error: ")
