# SPDX-License-Identifier: Apache-2.0
"""Rows of any kind: which are trained on, which are refused, and what a run does when they end."""

from __future__ import annotations

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from sae.oracle import planted
from sidechain._errors import InputError
from sidechain.sae import (
    IterableSource,
    Mesh,
    PipelineSource,
    Provenance,
    Rows,
    Sae,
    StoreSource,
    finish,
    train,
)
from sidechain.sae.features.evaluate import measure
from sidechain.sae.training import streams
from sidechain.sae.training.bad_rows import checked
from sidechain.store import ActivationStore, ActivationWriter, ArrayRows, Storage, split
from sidechain.testing import tiny_pipeline

D = 24
KW = dict(features=64, batch=256, progress=False)
ARCHITECTURES = ("topk", "batch_topk", "matryoshka", "jumprelu", "relu", "gated")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def x():
    return planted(4096, D)[0]


def run(data, out, **settings):
    return train(data, out, **{**KW, "tokens": 2048, **settings})


def equal(a, b):
    return all(torch.equal(t, b.state_dict()[n]) for n, t in a.state_dict().items())


class Plain:
    """A source of somebody else's, which looks at nothing."""

    def __init__(self, batches):
        self.made = batches

    def widths(self):
        return D, D

    def normalisers(self, kind, *, centre):
        return IterableSource([self.made[0]]).normalisers(kind, centre=centre)

    def batches(self, batch, start, mesh, device):
        yield from self.made[start:]

    def identity(self):
        return {"plain": 1}

    def provenance(self):
        return Provenance(source="plain")


# -- the same rows --------------------------------------------------------------------------------


class TestFingerprint:
    @pytest.mark.parametrize(
        "make",
        [
            lambda x: x,
            lambda x: [x],
            lambda x: x.numpy(),
            lambda x: iter(x.split(100)),
            lambda x: lambda: x.split(100),
            lambda x: DataLoader(TensorDataset(x), batch_size=64, shuffle=True),
            lambda x: [(x, torch.arange(len(x)) % 3)],
        ],
        ids=["tensor", "list", "array", "iterator", "function", "loader", "pairs"],
    )
    def test_other_rows_in_the_same_folder_are_refused(self, tmp_path, x, make):
        one = run(make(x), tmp_path)
        assert equal(one, run(make(x), tmp_path))
        changed = x.clone()
        changed[1234, 5] += 1e-3
        for other in (9 * x + 5, changed):
            with pytest.raises(InputError, match=r"expected the rows of the run in .*got others"):
                run(make(other), tmp_path)

    def test_other_steps_or_targets_are_other_rows(self, tmp_path, x):
        step = torch.arange(len(x)) % 3
        run([Rows(x, step, 2 * x)], tmp_path)
        for other in (Rows(x, step + 1, 2 * x), Rows(x, step, 3 * x)):
            with pytest.raises(InputError, match="expected the rows of the run"):
                run([other], tmp_path)

    def test_another_model_or_other_prompts(self, tmp_path):
        def source(prompts, pipe=None):
            return PipelineSource(
                pipe or tiny_pipeline(), "cross:1", prompts, buffer=100, batch_size=2,
                num_inference_steps=3, audio_end_in_s=1.0,
            )  # fmt: skip

        settings = dict(k=4, features=32, batch=16, tokens=160)
        one = run(source(["a", "b"]), tmp_path, **settings)
        assert equal(one, run(source(["a", "b"]), tmp_path, **settings))
        with pytest.raises(InputError, match=r"got others \[prompts_digest"):
            run(source(["a", "c"]), tmp_path, **settings)
        other = tiny_pipeline()
        with torch.no_grad():
            for weight in other.transformer.parameters():
                weight.mul_(1.1)
        with pytest.raises(InputError, match=r"got others \[summary"):
            run(source(["a", "b"], other), tmp_path, **settings)
        record = json.loads((tmp_path / "run.json").read_text())
        for name in ("summary", "prompts_digest"):  # as older versions wrote it
            record["source"].pop(name)
        (tmp_path / "run.json").write_text(json.dumps(record))
        assert equal(one, run(source(["a", "b"]), tmp_path, **settings))

    def test_a_stream_in_another_order_cannot_continue(self, tmp_path, x, monkeypatch):
        monkeypatch.setattr(streams, "CALIBRATION", 1024)  # what comes later is not compared early
        order = itertools.count()

        def stream():
            generator = torch.Generator().manual_seed(next(order))
            yield x[:1024]
            yield x[1024:][torch.randperm(len(x) - 1024, generator=generator)]

        with pytest.raises(InputError, match="and no more"):
            run(stream, tmp_path, tokens=8192)
        with pytest.raises(InputError, match="expected the rows of the run up to batch 16"):
            run(lambda: itertools.chain(stream(), stream()), tmp_path, tokens=8192)

    def test_a_stream_that_differs_each_time_is_named_at_once(self, tmp_path):
        with pytest.warns(RuntimeWarning, match="first rows are others than when"):
            run(lambda: (torch.randn(256, D) for _ in range(20)), tmp_path)

    def test_a_shuffling_loader_draws_from_the_seed(self, tmp_path, x):
        loader = DataLoader(TensorDataset(x), batch_size=64, shuffle=True)
        before = torch.get_rng_state()
        one, two = (run(loader, tmp_path / n, epochs=2, tokens=8192) for n in "ab")
        assert torch.equal(torch.get_rng_state(), before)
        assert equal(one, two)
        assert not equal(one, run(loader, tmp_path / "c", epochs=2, tokens=8192, seed=1))
        source = IterableSource(loader, epochs=2)
        first, second = torch.cat([r.x for r in source.batches(256, 0, Mesh(), CPU)]).chunk(2)
        assert not torch.equal(first, second)
        assert torch.equal(first.sort(0).values, x.sort(0).values)


# -- targets --------------------------------------------------------------------------------------


class TestTargets:
    def test_a_target_as_wide_as_x_makes_a_transcoder(self, tmp_path, x):
        target = 100 * x.flip(1) + 50
        for name, data, more in (
            ("rows", [Rows(x, None, target)], {}),
            ("stream", lambda: iter([Rows(x, None, target)]), {}),
            ("option", x, {"target": target}),
        ):
            sae = run(data, tmp_path / name, k=8, lr=3e-3, tokens=4096, **more)
            assert sae.config.transcoder and not sae.config.tied_bias
            error = (sae(x) - target).detach().square().mean()
            assert float(error / (x.flip(1) - target).square().mean()) < 0.9

    @pytest.mark.parametrize("stream", [False, True])
    def test_targets_that_are_not_wanted_or_come_and_go(self, tmp_path, x, stream):
        def given(*items):
            return (lambda: iter(items)) if stream else list(items)

        both, alone = Rows(x, None, x.flip(1)), Rows(x)
        with pytest.raises(InputError, match=r"expected rows with no target .*got one"):
            run(given(both), tmp_path, transcoder=False)
        with pytest.raises(InputError, match=r"expected rows with a target .*got none"):
            run(given(alone), tmp_path, transcoder=True)
        for first, second in ((both, alone), (alone, both), (Rows(x, torch.zeros(4096).long()), x)):
            with pytest.raises(InputError, match=r"in item 1|in every item or in none"):
                run(given(first, second), tmp_path / "b")
        assert not (tmp_path / "sae.safetensors").exists()

    def test_a_source_whose_targets_appear_late(self, tmp_path, x):
        items = [Rows(part) for part in x.split(256)]
        items[3] = items[3]._replace(target=items[3].x)
        with pytest.raises(InputError, match="expected rows with no target"):
            run(Plain(items), tmp_path)


# -- rows that are not finite ---------------------------------------------------------------------


def spoilt(x, value=float("nan"), row=2000):
    bad = x.clone()
    bad[row, 3] = value
    return bad


class TestBadRows:
    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    @pytest.mark.parametrize("value", [float("nan"), float("-inf"), 1e30])
    def test_stops_before_the_step(self, tmp_path, x, architecture, value):
        y = spoilt(x, value)
        with pytest.raises(InputError, match=r"step 8: .*row 208 of item 7"):
            run(lambda: iter(y.split(256)), tmp_path, architecture=architecture)
        assert not (tmp_path / "sae.safetensors").exists()
        sae = finish(tmp_path)
        assert sae.provenance.tokens == 7 * 256 and sae.provenance.metrics["fvu"] > 0
        assert all(bool(t.isfinite().all()) for n, t in sae.named_parameters())

    def test_arrays_are_refused_before_the_first_step(self, tmp_path, x):
        with pytest.raises(InputError, match=r"before step 1: .*row 2000"):
            run(spoilt(x), tmp_path)
        with pytest.raises(InputError, match="row 2000"):
            run([Rows(x, None, spoilt(x))], tmp_path / "target")

    def test_skipped_rows_are_left_out_and_counted(self, tmp_path, x):
        y = spoilt(spoilt(x), row=17)
        for name, data, tokens in (("array", y, 4096), ("stream", lambda: y.split(100), 3840)):
            sae = run(data, tmp_path / name, on_bad_rows="skip", tokens=tokens)
            assert bool(sae.w_dec.isfinite().all())
            assert sae.provenance.extra["skipped_rows"] == 2
        clean = torch.cat([x[:17], x[18:2000], x[2001:]])
        same = run(lambda: iter([clean]), tmp_path / "clean", tokens=3840)
        assert equal(same, Sae.load(tmp_path / "stream" / "sae.safetensors"))

    def test_the_policy_may_change_and_the_count_survives(self, tmp_path, x):
        y = spoilt(spoilt(x), row=300)
        data = lambda: iter(y.split(256))  # noqa: E731
        with pytest.raises(InputError, match="step 2:"):
            run(data, tmp_path)
        sae = run(data, tmp_path, on_bad_rows="skip")
        assert sae.provenance.extra["skipped_rows"] == 2
        assert equal(sae, run(data, tmp_path / "whole", on_bad_rows="skip"))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_stores(self, tmp_path, x, dtype):
        """A store takes no row that is not finite, but one whose square is not."""
        with ActivationWriter(tmp_path / "s", {"a": D}, Storage(dtype)) as writer:
            writer.set_grid([1.0])
            writer.write({"a": spoilt(x, 1e30)}, step=0, branch="cond", prompt=0)
        store = ActivationStore(tmp_path / "s")
        with pytest.raises(InputError, match="row 2000"):
            run(store, tmp_path / "run", tokens=8192)
        sae = run(store, tmp_path / "run", on_bad_rows="skip", tokens=8192)
        assert sae.provenance.extra["skipped_rows"] == 2  # one in each epoch
        assert bool(sae.w_dec.isfinite().all()) and float(sae.normaliser.scale) < 10

    def test_a_replacement_does_not_depend_on_where_a_run_goes_on(self, tmp_path, x):
        with ActivationWriter(tmp_path / "s", {"a": D}, Storage(torch.float32)) as writer:
            writer.set_grid([1.0])
            writer.write({"a": spoilt(spoilt(x, 1e30), 1e30, row=5)}, step=0)
        source = StoreSource(ActivationStore(tmp_path / "s"))
        source.bad_rows.policy = "skip"
        whole = list(itertools.islice(source.batches(256, 0, Mesh(), CPU), 40))
        late = list(itertools.islice(source.batches(256, 11, Mesh(), CPU), 29))
        assert all(torch.equal(a.x, b.x) for a, b in zip(whole[11:], late, strict=True))
        assert all(float(rows.x.abs().max()) < 1e3 for rows in whole)

    def test_a_source_that_does_not_look(self, tmp_path, x):
        items = [Rows(part) for part in spoilt(x).split(256)]
        with pytest.raises(InputError, match=r"step 8: .*row 208 of the batch"):
            run(Plain(items), tmp_path)
        with pytest.raises(NotImplementedError, match="expected on_bad_rows='error'"):
            run(Plain(items), tmp_path / "b", on_bad_rows="skip")
        assert len(list(checked(iter(items[:7])))) == 7

    def test_a_pipeline(self, tmp_path, monkeypatch):
        def make():
            return PipelineSource(
                tiny_pipeline(), "cross:1", ["a", "b"], buffer=100, batch_size=2,
                num_inference_steps=3, audio_end_in_s=1.0,
            )  # fmt: skip

        real = PipelineSource._call
        bad = []

        def call(self, number):
            rows = real(self, number)
            if number == 3:
                rows.x[4:6] = torch.inf
                bad.append(number)
            return rows

        monkeypatch.setattr(PipelineSource, "_call", call)
        settings = dict(k=4, features=32, batch=16, tokens=1600)
        with pytest.raises(InputError, match=r"2 others among .* at scheduler step \d"):
            run(make(), tmp_path, **settings)
        assert bad and not (tmp_path / "sae.safetensors").exists()
        sae = run(make(), tmp_path, on_bad_rows="skip", **settings)
        assert sae.provenance.extra["skipped_rows"] == 2
        assert bool(sae.w_dec.isfinite().all())

    def test_a_run_that_diverges_keeps_its_last_good_checkpoint(self, tmp_path, x):
        settings = dict(checkpoint_minutes=0.0, log_every=1, tokens=4096, normalise="none")
        good = [Rows(part) for part in x.split(256)]
        good[9] = Rows(good[9].x * 1e18)  # finite, and so is the square of each row
        with pytest.raises(InputError, match=r"step \d+: expected finite weights.*lower lr"):
            run(Plain(good), tmp_path, lr=1e15, architecture="relu", **settings)
        assert not (tmp_path / "sae.safetensors").exists()
        assert bool(finish(tmp_path).w_dec.isfinite().all())


# -- how many there are ---------------------------------------------------------------------------


class TestTokens:
    def test_known_lengths_are_checked_at_the_start(self, tmp_path, x):
        with pytest.raises(InputError, match=r"expected tokens <= 4096 .* got 8448: set epochs"):
            run(x, tmp_path / "run", tokens=8448)
        assert not (tmp_path / "run").exists()
        assert run(x, tmp_path / "run", tokens=8192, epochs=2).provenance.tokens == 8192

    def test_all_of_them_by_default(self, tmp_path, x):
        assert run(x[:1000], tmp_path / "a", tokens=None).provenance.tokens == 768
        sae = run(x[:1000], tmp_path / "b", tokens=None, epochs=3)
        assert sae.provenance.tokens == 3 * 768
        with pytest.raises(TypeError, match="expected tokens"):
            run(iter([x]), tmp_path / "c", tokens=None)
        with pytest.raises(InputError, match=r"expected at least 256 rows \[one batch\], got few"):
            run(x[:100], tmp_path / "d", tokens=None)
        assert not (tmp_path / "d").exists()

    def test_a_stream_that_ends_is_saved(self, tmp_path, x):
        with pytest.raises(InputError, match=r"expected 8448 rows \[tokens\], got 4096 and no m"):
            run(iter([x]), tmp_path, tokens=8448, lr=1e-3)
        with pytest.raises(InputError, match="or give a reason"):
            run(iter([x]), tmp_path, tokens=4096, lr=1e-3)
        with pytest.raises(InputError, match=r"expected tokens >= 4096 \[trained on already\]"):
            run(iter([x]), tmp_path, tokens=2048, lr=1e-3, reason="fewer")
        sae = run(iter([x]), tmp_path, tokens=4096, lr=1e-3, reason="no more rows")
        assert sae.provenance.tokens == 4096 and sae.provenance.metrics["fvu"] > 0
        (change,) = sae.provenance.extra["changes"]
        assert change["reason"] == "no more rows"
        assert change["settings"] == {"tokens": [8448, 4096]}

    def test_finish_now_and_go_on(self, tmp_path, x, capsys):
        with pytest.raises(InputError, match="and no more"):
            run(lambda: iter([x[:1024]]), tmp_path, tokens=4096)
        early = finish(tmp_path)
        assert early.provenance.tokens == 1024 and equal(early, finish(tmp_path))
        assert equal(early, run(lambda: iter([x[:1024]]), tmp_path, tokens=4096))
        assert "finished at step 4 of 16" in capsys.readouterr().err
        with pytest.raises(InputError, match="expected a run with a checkpoint"):
            (tmp_path / "empty").mkdir()
            (tmp_path / "empty" / "run.json").write_text("{}")
            finish(tmp_path / "empty")
        with pytest.raises(InputError, match=r"got no run\.json"):
            finish(tmp_path / "nothing")

    def test_a_finished_run_is_made_longer(self, tmp_path, x):
        first = run(x, tmp_path, tokens=2048)
        more = run(x, tmp_path, tokens=4096, lr=1e-3, reason="loss still falls")
        assert more.provenance.tokens == 4096 and not equal(first, more)
        assert equal(first, Sae.load(tmp_path / "sae-step-000000008.safetensors"))
        (change,) = json.loads((tmp_path / "run.json").read_text())["changes"]
        assert change["step"] == 8 and change["settings"]["lr"] == [None, 1e-3]
        with pytest.raises(InputError, match="expected batch=256"):
            run(x, tmp_path, tokens=4096, lr=1e-3, batch=128, reason="any")

    def test_a_longer_run_keeps_its_batch(self, tmp_path):
        x = planted(520_000, 4)[0]
        settings = dict(features=8, k=2, progress=False)
        first = train(x[:300_000], tmp_path / "other", **settings)
        assert first.provenance.extra["train"]["batch"] == 256
        train(x, tmp_path / "run", tokens=300_000, **settings)
        more = train(x, tmp_path / "run", reason="all of them", **settings)
        assert more.provenance.extra["train"]["batch"] == 256
        assert more.provenance.tokens == 520_000 // 256 * 256

    def test_a_finished_run_without_a_checkpoint_is_not_begun_anew(self, tmp_path, x):
        first = run(x, tmp_path, tokens=2048)
        shutil.rmtree(tmp_path / "checkpoints")
        with pytest.raises(InputError, match="expected a checkpoint to go on from"):
            run(x, tmp_path, tokens=4096, reason="longer")
        assert equal(first, Sae.load(tmp_path / "sae.safetensors"))

    def test_epochs_of_an_iterator(self, x):
        with pytest.raises(ValueError, match="expected epochs=1 with an iterator"):
            IterableSource(iter([x]), epochs=2)

    def test_held_out_rows(self, tmp_path, x):
        sae = run(x, tmp_path, tokens=None, held_out=0.25, epochs=4, k=4, lr=3e-3)
        assert sae.provenance.tokens == 4 * 3072
        metrics = sae.provenance.metrics
        held = split(ArrayRows(x), 0.25)[1]
        assert metrics["held_out_fvu"] == pytest.approx(measure(sae, held).fvu, rel=1e-6)
        assert 0.1 < metrics["held_out_fvu"] < 1 and metrics["held_out_l0"] > 0


# -- what rows look like --------------------------------------------------------------------------


class TestForms:
    def test_layouts_give_the_same_dictionary(self, tmp_path, x):
        wide = torch.zeros(4096, 2 * D)
        wide[:, ::2] = x
        forms = {
            "plain": x,
            "columns": x.T.contiguous().T,
            "strided": wide[:, ::2],
            "numpy": np.asfortranarray(x.numpy()),
            "3d": x.reshape(64, 64, D),
            "parts": list(x.split(1000)),
        }
        made = {name: run(form, tmp_path / name) for name, form in forms.items()}
        assert all(equal(made["plain"], other) for other in made.values())

    @pytest.mark.parametrize("normalise", ["none", "global"])
    def test_a_source_of_column_major_rows(self, tmp_path, x, normalise):
        parts = x.split(256)
        rows = Plain([Rows(part) for part in parts])
        turned = Plain([Rows(part.T.contiguous().T) for part in parts])
        one, two = (
            run(source, tmp_path / str(n), normalise=normalise, architecture="topk")
            for n, source in enumerate((rows, turned))
        )
        assert equal(one, two)

    def test_streams_of_column_major_rows_and_arrays(self, tmp_path, x):
        one = run(lambda: iter(x.split(300)), tmp_path / "a")
        two = run(lambda: (p.T.contiguous().T.numpy() for p in x.split(300)), tmp_path / "b")
        three = run(lambda: ({"x": p} for p in x.split(300)), tmp_path / "c")
        assert equal(one, two) and equal(one, three)

    def test_a_buffer_shuffles_a_stream(self, x):
        stream = lambda: iter(x.split(100))  # noqa: E731
        plain = torch.cat([r.x for r in IterableSource(stream).batches(256, 0, Mesh(), CPU)])
        source = IterableSource(stream, buffer=1000, seed=3)
        mixed = torch.cat([r.x for r in source.batches(256, 0, Mesh(), CPU)])
        late = torch.cat([r.x for r in source.batches(256, 5, Mesh(), CPU)])
        assert not torch.equal(plain, mixed) and torch.equal(mixed[5 * 256 :], late)
        assert torch.equal(plain.sort(0).values, mixed.sort(0).values)

    @pytest.mark.parametrize(
        ("data", "error", "message"),
        [
            (5, TypeError, "expected rows"),
            ("nothing.npy", FileNotFoundError, "nothing.npy"),
            (torch.zeros(8, D).long(), TypeError, "float.*got int64"),
            (np.zeros((8, D), bool), TypeError, "float.*got bool"),
            (torch.zeros(8, D, dtype=torch.complex64), TypeError, "float.*got complex64"),
            (torch.zeros(8), (TypeError, ValueError), r"\[\.\.\., d\]"),
            ([], (TypeError, ValueError), "at least one|expected rows"),
            ([torch.zeros(300, D), torch.zeros(300, D + 1)], ValueError, "width"),
            (lambda: [torch.zeros(300, D), torch.zeros(300, D + 1)], ValueError, "width"),
            (DataLoader(TensorDataset(torch.zeros(8, D), torch.zeros(8))), TypeError, "list of 2"),
        ],
    )
    def test_refused(self, tmp_path, data, error, message):
        with pytest.raises(error, match=message):
            run(data, tmp_path / "run")
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize(
        ("item", "message"),
        [
            (np.ma.masked_invalid(np.full((300, D), np.nan, np.float32)), "without a mask"),
            (torch.zeros(300, D).to_sparse(), "dense tensor"),
            (torch.zeros(300, D, device="meta"), "without data"),
            (np.zeros((300, D), ">f4"), "byte order"),
            (torch.zeros(300, D).int(), "got int32"),
            (torch.zeros(300), r"\[\.\.\., d\]"),
        ],
    )
    @pytest.mark.parametrize("form", ["array", "stream", "pair", "target"])
    def test_each_form_refuses_the_same(self, tmp_path, item, message, form):
        good = torch.zeros(300, D)
        data = {
            "array": item,
            "stream": lambda: iter([item]),
            "pair": [(item, 0)],
            "target": [Rows(good, None, item)],
        }[form]
        with pytest.raises((TypeError, ValueError), match=message):
            run(data, tmp_path / "run", tokens=256)

    def test_settings_that_nobody_has(self, tmp_path, x):
        with pytest.raises(TypeError, match=r"expected settings of SaeConfig.*got colour"):
            run(x, tmp_path, colour=1)
        with pytest.raises(TypeError, match="expected no buffer with rows that are read by number"):
            run(x, tmp_path, buffer=100)
        with pytest.raises(TypeError, match="expected no held_out with a stream"):
            run(iter([x]), tmp_path, held_out=0.5)
