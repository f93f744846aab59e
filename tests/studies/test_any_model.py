# SPDX-License-Identifier: Apache-2.0
"""Studies by the command line on pipelines that were saved to folders: AudioLDM2, SDXL."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

import sidechain
from sidechain import InputError
from sidechain.cli import main as cli
from sidechain.scorers import Samples
from sidechain.store import ActivationStore
from sidechain.studies import memory, models
from sidechain.studies.processes import Processes
from sidechain.testing import tiny_clap, tiny_clip, tiny_pipeline
from sidechain.vectors import SteeringVector

SMALL = ("--call", "height=16", "--call", "width=16", "--steps", "2")
SHORT = ("--call", "audio_length_in_s=0.008", "--call", "max_new_tokens=3", "--steps", "2")
PAIRS = """concept,clean_prompt,corrupted_prompt,text
piano,a slow piano song,a slow violin song,piano music
piano,a happy piano song in the rain,a happy song,
loud drums/x,fast rock with drums,fast rock,
"""
PLANTED = "cross:3"


@pytest.fixture(scope="session")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    for name in ("sdxl", "audioldm2"):
        tiny_pipeline(name).save_pretrained(folder / name)
    planted = tiny_pipeline("sdxl")
    for site in sidechain.sites(planted, kind="cross"):
        if site.alias != PLANTED:
            for weight in site.module.to_out[0].parameters():
                weight.data.zero_()
    planted.save_pretrained(folder / "planted")
    tiny_clap(folder / "clap")
    tiny_clip(folder / "clip")
    (folder / "pairs.csv").write_text(PAIRS)
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A working folder with a scorer of its own: how bright an image is, whatever the text."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_scorer.py").write_text(
        "def brightness(samples, texts):\n"
        "    light = samples.images('own').double().mean((1, 2, 3))\n"
        "    return (light - 0.5)[:, None].expand(-1, len(texts))\n"
        "def darkness(samples, texts):\n"
        "    return -brightness(samples, texts)\n"
        "def nothing(samples, texts):\n"
        "    return brightness(samples, texts) * float('nan')\n"
        "def narrow(samples, texts):\n"
        "    return brightness(samples, texts)[:, 0]\n"
    )
    return tmp_path


def localize(saved, model, *words):
    scan = ("localize", "--model", str(saved / model), "--prompts", str(saved / "pairs.csv"))
    return cli.main([*scan, "--out", "run", *words])


class TestLocalize:
    def test_sdxl_with_clip(self, saved, here, capsys):
        assert localize(saved, "sdxl", "--scorer", f"clip:{saved / 'clip'}", *SMALL) == 0
        assert capsys.readouterr().out == "run\n"
        scores = pd.read_csv("run/scores.csv")
        assert list(scores) == ["concept", "preset", "pair", "seed", "scorer", "score"]
        # per pair: none, all, 8 sites and the best 1 to 7 of them
        assert len(scores) == 3 * (2 + 8 + 7)
        assert set(scores.concept) == {"piano", "loud drums/x"}
        assert scores.score.between(-1, 1).all()
        assert scores.groupby(["concept", "pair"]).score.nunique().min() > 8
        page = Path("run/report.html").read_text()
        assert "pooled text embedding" in page and "loud drums/x" in page
        assert (pd.read_csv("run/impact.csv").model == str(saved / "sdxl")).all()
        assert not list(Path("run/parts/pieces").iterdir())

    def test_the_text_column_is_what_the_scorer_compares_with(self, saved, here):
        pipe = models.load_pipeline(str(saved / "sdxl"), None, torch.float32)
        subject = models.PipelineSubject(pipe, "sdxl", {"height": 16, "width": 16})
        assert localize(saved, "sdxl", "--scorer", f"clip:{saved / 'clip'}", *SMALL) == 0
        scores = pd.read_csv("run/scores.csv").set_index(["concept", "pair", "preset"]).score
        (scorer,) = sidechain.scorers.load_scorers([f"clip:{saved / 'clip'}"]).values()
        texts = ["piano music", "piano"]  # of pair 0 by its column, of pair 1 by the concept
        corrupted = ["a slow violin song", "a happy song"]
        from sidechain.studies import common

        seeds = [common.noise_seed(0, index) for index in (0, 1)]
        plain = subject.generate(corrupted, seeds, **subject.call(2, 3.0))
        found = scorer.scores(plain, texts)
        for pair in (0, 1):
            assert scores["piano", pair, "none"] == pytest.approx(
                float(found[pair, pair]), abs=2e-6
            )
        # And everywhere each pair sees the clean prompt of its own.
        call = subject.call(2, 3.0)
        clean = ["a slow piano song", "a happy piano song in the rain"]
        given = sidechain.contexts(pipe, clean, masks=True, **call)
        with sidechain.patch(pipe, "cross:*", context=given):
            patched = subject.generate(corrupted, seeds, **call)
        found = scorer.scores(patched, texts)
        for pair in (0, 1):
            assert scores["piano", pair, "all"] == pytest.approx(float(found[pair, pair]), abs=2e-5)
        assert abs(float(found[0, 0] - found[0, 1])) > 1e-4

    def test_audioldm2_with_clap_and_texts_of_different_length(self, saved, here):
        words = ("--scorer", f"clap:{saved / 'clap'}", *SHORT)
        assert localize(saved, "audioldm2", *words, "--audio") == 0
        scores = pd.read_csv("run/scores.csv")
        count = len(sidechain.sites(tiny_pipeline("audioldm2"), kind="cross"))
        assert len(scores) == 3 * (2 + count + count - 1)
        assert scores.score.between(-1, 1).all()
        clips = sorted(path.name for path in Path("run/audio").iterdir())
        assert "piano_all.flac" in clips and len(clips) == 2 * (2 + count + count - 1)
        # A row does not depend on what else is in its batch, though pads grow with the longest.
        first = scores.sort_values(["concept", "pair", "preset"])
        assert localize(saved, "audioldm2", *words, "--batch-rows", "2", "--out", "small") == 0
        small = pd.read_csv("small/scores.csv").sort_values(["concept", "pair", "preset"])
        assert first.score.to_numpy() == pytest.approx(small.score.to_numpy(), abs=2e-5)

    def test_the_one_site_that_matters_is_found(self, saved, here):
        words = ("--scorer", "own_scorer:brightness", "--scorer", "own_scorer:darkness")
        assert localize(saved, "planted", *words, *SMALL) == 0
        table = pd.read_csv("run/impact.csv")
        for concept in ("piano", "loud drums/x"):
            for scorer in ("brightness", "darkness"):
                rows = table[(table.concept == concept) & (table.metric == scorer)]
                impact = rows.set_index("block").impact
                if impact.isna().all():
                    continue  # the prompt makes it darker (or brighter) than without the concept
                assert impact[PLANTED] == pytest.approx(1.0, abs=1e-3)
                assert impact.drop(PLANTED).abs().max() == pytest.approx(0.0, abs=1e-3)
            # One of the two sees the concept come.
            defined = table[
                (table.concept == concept) & table.metric.isin(["brightness", "darkness"])
            ]
            assert defined.impact.notna().sum() == 8
        assert pd.read_csv("run/ranking.csv").site.notna().all()

    def test_a_cut_off_part_goes_on_piece_by_piece(self, saved, here, monkeypatch):
        words = ("--scorer", "own_scorer:brightness", *SMALL, "--batch-rows", "7")
        assert localize(saved, "sdxl", *words, "--out", "whole") == 0
        calls, generate = [], models.PipelineSubject.generate

        def counted(self, prompts, seeds, **call):
            calls.append(len(prompts))
            if len(calls) == 3:
                raise KeyboardInterrupt
            return generate(self, prompts, seeds, **call)

        monkeypatch.setattr(models.PipelineSubject, "generate", counted)
        assert localize(saved, "sdxl", *words) == 130
        assert len(list(Path("run/parts/pieces").iterdir())) == 2
        assert localize(saved, "sdxl", *words) == 0
        # 20 + 10 jobs of single sites, 14 + 7 of best sites, at most 7 at a time
        assert len(calls) - 3 == (3 + 2 + 2 + 1) - 2
        for name in ("scores.csv", "impact.csv", "summary.json"):
            assert (here / "run" / name).read_text() == (here / "whole" / name).read_text()

    def test_two_processes_write_the_tables_of_one(self, saved, here):
        words = ("--scorer", "own_scorer:brightness", *SMALL, "--batch-rows", "7")
        assert localize(saved, "sdxl", *words, "--out", "whole") == 0
        run = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
            "-m", "sidechain", "localize", "--model", str(saved / "sdxl"),
            "--prompts", str(saved / "pairs.csv"), "--out", "run", *words,
        ]  # fmt: skip
        made = subprocess.run(run, capture_output=True, text=True, timeout=300, check=False)
        assert made.returncode == 0, made.stderr[-2000:]
        for name in ("scores.csv", "impact.csv", "summary.json"):
            assert (here / "run" / name).read_text() == (here / "whole" / name).read_text()


class TestOtherCommands:
    def test_vector_steer_and_capture(self, saved, here, capsys):
        model = ("--model", str(saved / "sdxl"), *SMALL)
        Path("sides.csv").write_text(
            "positive,negative\na piano song,a song\nslow piano music,slow music\n"
        )
        Path("prompts.txt").write_text("a slow violin song\nfast rock with drums\n")
        made = ("vector", *model, "--prompts", "sides.csv", "--out", "v.safetensors")
        assert cli.main([*made, "--concept", "piano"]) == 0
        vector = SteeringVector.load("v.safetensors")
        assert (vector.concept, len(vector.sites), vector.steps) == ("piano", 8, 2)
        swept = ("steer", *model, "--vector", "v.safetensors", "--prompts", "prompts.txt")
        scored = ("--scorer", f"clip:{saved / 'clip'}", "--sites", PLANTED, "--out", "steer")
        assert cli.main([*swept, *scored, "--strengths", "0,4", "--scored-text", "piano song"]) == 0
        rows = pd.read_csv("steer/readings.csv")
        assert len(rows) == 2 * 5  # prompts x (strength 0, then four arms)
        assert (rows[rows.arm == "none"].distance == 0).all()
        assert (rows[rows.arm == "all"].distance > 0).all()
        assert rows.prompt_kept.isin([0, 1]).all()
        assert "“piano song”" in Path("steer/report.html").read_text()
        recorded = ("capture", *model, "--prompts", "prompts.txt", "--sites", "cross:0")
        assert cli.main([*recorded, "--out", "store"]) == 0
        assert len(ActivationStore("store")) == 2 * 2 * 16  # prompts x steps x tokens
        capsys.readouterr()

    def test_a_sweep_goes_on_with_other_rows_at_once(self, saved, here, monkeypatch, capsys):
        vector = ("vector", "--model", str(saved / "sdxl"), *SMALL, "--prompts", "sides.csv")
        Path("sides.csv").write_text("positive,negative\na piano song,a song\n")
        assert cli.main([*vector, "--concept", "piano", "--out", "v.safetensors"]) == 0
        Path("prompts.txt").write_text("a slow song\nfast rock\na happy song\n")
        words = (
            "steer", "--model", str(saved / "sdxl"), *SMALL, "--vector", "v.safetensors",
            "--prompts", "prompts.txt", "--scorer", "own_scorer:brightness", "--sites", PLANTED,
            "--distance", f"clip:{saved / 'clip'}", "--strengths", "0,4", "--batch-rows", "auto",
        )  # fmt: skip
        generate, calls = models.PipelineSubject.generate, []

        def cut(self, prompts, seeds, **call):
            calls.append(len(prompts))
            if len(calls) == 2:
                raise KeyboardInterrupt
            return generate(self, prompts, seeds, **call)

        with monkeypatch.context() as patched:
            patched.setattr(memory, "batch_rows", lambda *_: 5)  # one prompt at once
            patched.setattr(models.PipelineSubject, "generate", cut)
            assert cli.main([*words, "--out", "steer"]) == 130, capsys.readouterr().err
        monkeypatch.setattr(memory, "batch_rows", lambda *_: 10)  # two
        assert cli.main([*words, "--out", "steer"]) == 0
        rows = pd.read_csv("steer/readings.csv")
        assert rows.groupby("prompt").size().to_dict() == {0: 5, 1: 5, 2: 5}

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            ("localize", "--prompts: expected prompt pairs for"),
            ("vector --concept drums", "--prompts: expected a CSV with columns positive,negative"),
            ("capture", "--prompts: expected a text file for"),
            ("steer --concept drums", "--scorer: expected clap:"),
            ("steer --concept drums --scorer own_scorer:darkness", "--vector: expected a file for"),
            ("sae score", "sae score: expected the zoo's music model"),
        ],
    )
    def test_what_only_the_zoo_can_do_says_so(self, saved, here, capsys, words, message):
        assert (
            cli.main([*words.split(), "--model", str(saved / "sdxl"), "--out", out_of(words)]) == 2
        )
        check_line(capsys, message)


def out_of(words):
    return "out.safetensors" if words.startswith("vector") else "out"


def check_line(capsys, message):
    error = capsys.readouterr().err.splitlines()
    # Libraries may say something too; ours is the last line, and the only one of its kind.
    assert error[-1].startswith("sidechain: error: ")
    assert message in error[-1], error[-1]
    assert sum(line.startswith("sidechain: ") for line in error) == 1


BAD = {
    "no pipeline": ("empty", (), "--model: expected a saved pipeline in"),
    "another class": ("strange", (), "--model: expected a diffusers pipeline in"),
    "damaged weights": ("damaged", (), "--model: expected a diffusers pipeline in"),
    "nan": ("nan", (), "unet: expected finite weights, got NaN or infinity in conv_in.bias"),
    "site": ("sdxl", ("--sites", "cross:99"), "sites: expected one of cross:0-7"),
    "call": (
        "sdxl",
        ("--call", "wings=2"),
        "--call: expected arguments of a Stable",
    ),
    "set": ("sdxl", ("--call", "output_type=pil"), "--call: expected no output_type"),
    "revision": ("sdxl", ("--revision", "main"), "--revision: expected none for a folder"),
    "device": ("sdxl", ("--device", "cuda:77"), "--device: expected a device of this machine"),
    "zoo": ("sdxl", ("--scorer", "zoo"), "--scorer: expected no zoo for"),
    "other type": ("sdxl", ("--scorer", "clap:{saved}/clip"), "expected a model of type clap, got"),
    "no scorer": ("sdxl", ("--scorer", "clip:{saved}/empty"), "expected the folder or the hub id"),
    "nan scorer": ("sdxl", ("--scorer", "clip:{saved}/nan_clip"), "expected finite weights, got"),
    "no weights": ("sdxl", ("--scorer", "clip:{saved}/bare_clip"), "expected"),
    "module": ("sdxl", ("--scorer", "nowhere:score"), "--scorer: expected module:function"),
    "function": ("sdxl", ("--scorer", "own_scorer:wings"), "--scorer: expected module:function"),
    "sound": ("sdxl", ("--scorer", "clap:{saved}/clap"), "scorer clap: expected samples of sound"),
    "nan scores": ("sdxl", ("--scorer", "own_scorer:nothing"), "expected finite scores, got nan"),
    "shape": ("sdxl", ("--scorer", "own_scorer:narrow"), "expected scores of shape [20, 2]"),
    "audio": ("sdxl", ("--scorer", "own_scorer:darkness", "--audio"), "--audio: expected samples"),
}


@pytest.fixture(scope="session")
def broken(saved) -> Path:
    (saved / "empty").mkdir()
    (saved / "strange").mkdir()
    (saved / "strange" / "model_index.json").write_text('{"_class_name": "StrangePipeline"}')
    shutil.copytree(saved / "sdxl", saved / "damaged")
    (weights,) = (saved / "damaged" / "unet").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:200])
    pipe = tiny_pipeline("sdxl")
    pipe.unet.conv_in.bias.data[0] = float("nan")
    pipe.save_pretrained(saved / "nan")
    from safetensors.torch import load_file, save_file

    for name in ("nan_clip", "bare_clip"):
        shutil.copytree(saved / "clip", saved / name)
        file = saved / name / "model.safetensors"
        tensors = load_file(file)
        if name == "nan_clip":
            next(iter(tensors.values())).view(-1)[0] = float("nan")
        else:
            del tensors["visual_projection.weight"]
        save_file(tensors, file, {"format": "pt"})
    return saved


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(broken, here, capsys, name):
    model, words, message = BAD[name]
    scorer = () if "--scorer" in words else ("--scorer", "own_scorer:brightness")
    given = [word.format(saved=broken) for word in words]
    assert localize(broken, model, *scorer, *SMALL, *given) == 2
    check_line(capsys, message)
    assert not Path("run/scores.csv").exists()


def test_a_hub_id_that_is_not_on_this_machine(here, saved, capsys):
    scan = ("localize", "--model", "nobody/nothing", "--prompts", str(saved / "pairs.csv"))
    assert cli.main([*scan, "--scorer", "own_scorer:brightness"]) == 2
    check_line(capsys, "--model: expected a diffusers pipeline in nobody/nothing, got")


def test_a_vector_of_another_width(here, saved, capsys):
    other = tiny_pipeline("sd")
    from sidechain.vectors import PromptPairs, caa

    pairs = PromptPairs(["a piano song"], ["a song"])
    call = {"height": 16, "width": 16, "num_inference_steps": 2}
    caa(other, pairs, progress=False, **call).save("v.safetensors")
    Path("prompts.txt").write_text("a song\n")
    words = ("--vector", "v.safetensors", "--prompts", "prompts.txt", "--sites", "cross:0")
    steer = ("steer", "--model", str(saved / "sdxl"), "--scorer", "own_scorer:brightness", *SMALL)
    assert cli.main([*steer, *words, "--distance", "spectral"]) == 2
    check_line(capsys, "SteeringVector: expected a denoiser with config hash")


class TestSubject:
    def test_parts_on_two_devices(self):
        pipe = tiny_pipeline("sdxl")
        pipe.vae.to("meta")
        with pytest.raises(InputError, match=r"all parts on one device, got .*vae on meta"):
            models.PipelineSubject(pipe, "sdxl")

    def test_samples_that_are_not_finite_name_the_prompt(self):
        pipe = tiny_pipeline("sdxl")
        subject = models.PipelineSubject(pipe, "sdxl", {"height": 16, "width": 16})
        pipe.vae.decoder.conv_in.bias.data.fill_(float("inf"))  # after the check of the weights
        with pytest.raises(InputError, match=r"expected finite samples, .* for 'a piano'"):
            subject.generate(["a piano"], [0], **subject.call(1, 1.0))

    def test_videos_are_refused(self):
        class Frames:
            frames = torch.zeros(1, 2, 3, 4, 4)

        with pytest.raises(InputError, match="expected a pipeline that puts out audios or images"):
            models.samples_of(tiny_pipeline("wan"), Frames())

    def test_fillers_are_the_longest_texts(self):
        pipe = tiny_pipeline("audioldm2")
        subject = models.PipelineSubject(
            pipe, "a", {"audio_length_in_s": 0.008, "max_new_tokens": 3}
        )
        texts = ["a song", "a happy piano song in the rain", "rock"]
        assert subject.fillers(texts, **subject.call(2, 3.0)) == [texts[1]]
        pads = tiny_pipeline("sdxl")
        subject = models.PipelineSubject(pads, "b", {"height": 16, "width": 16})
        assert subject.fillers(texts, **subject.call(2, 3.0)) == []


class TestBatchRows:
    def test_how_many_fit(self):
        assert memory.fitting(1000 << 20, 300 << 20, 400 << 20) == 2 + 7
        assert memory.fitting(0, 1, 2) == 2
        assert memory.fitting(1 << 40, 5, 5) == memory.MOST

    def test_auto_measures_and_gives_the_same_table(self, saved, here):
        words = ("--scorer", "own_scorer:brightness", *SMALL, "--sites", "cross:0-1")
        assert localize(saved, "sdxl", *words, "--batch-rows", "auto") == 0
        assert json.loads(Path("run/manifest.json").read_text())["config"]["batch_rows"] == "auto"
        assert localize(saved, "sdxl", *words, "--out", "plain") == 0
        order = ["concept", "pair", "preset"]
        auto, plain = (pd.read_csv(f"{n}/scores.csv").sort_values(order) for n in ("run", "plain"))
        assert auto.score.to_numpy() == pytest.approx(plain.score.to_numpy(), abs=2e-5)

    def test_a_row_that_takes_more_leaves_fewer(self, monkeypatch):
        class Hungry:
            device = "cpu"

            def encode(self, prompts):
                return prompts

            def call(self, steps, guidance):
                return {}

            def generate(self, prompts, seeds, **call):
                self.held = None
                self.held = torch.ones(len(prompts), 48 << 20, dtype=torch.uint8)
                return Samples(images=torch.zeros(len(prompts), 3, 1, 1))

        config = type("Config", (), {"batch_rows": "auto", "guidance": 1.0})
        monkeypatch.setattr(memory._Cpu, "free", lambda self: 480 << 20)
        found = memory.batch_rows(config, Hungry(), "a", Processes())
        # 0.7 x 480 MiB of about 48 MiB each, more than the allocator keeps of what is freed.
        assert 2 + 3 <= found <= 2 + 9
