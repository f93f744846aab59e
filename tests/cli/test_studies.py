# SPDX-License-Identifier: Apache-2.0
"""What whole command lines of the studies mean."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli.support import write
from sidechain.cli import main as cli
from sidechain.studies.capture import CaptureConfig
from sidechain.studies.demo.config import SHORT
from sidechain.studies.features.config import DictionaryConfig
from sidechain.studies.localization import LocalizationConfig
from sidechain.studies.steering import SteeringConfig
from sidechain.studies.vectors import VectorConfig
from sidechain.zoo.music.concepts import CONCEPTS, DEFAULT_CONCEPTS


def test_defaults_of_the_commands_are_those_of_the_studies(studies):
    """An option nobody gives changes nothing; only the places to write are the commands' own."""
    assert cli.main(["localize"]) == 0
    assert studies.localization == LocalizationConfig(out=Path("runs/localize"))
    assert cli.main(["capture"]) == 0
    assert studies.capture == CaptureConfig(out=Path("runs/capture"))
    assert cli.main(["vector", "--concept", "drums"]) == 0
    out = Path("runs/vectors/drums.safetensors")
    assert studies.vectors == VectorConfig(concept="drums", out=out)
    assert cli.main(["steer", "--concept", "drums"]) == 0
    assert studies.steering == SteeringConfig(concept="drums", out=Path("runs/steer"))
    assert cli.main(["sae", "score"]) == 0
    assert studies.features == DictionaryConfig(out=Path("runs/sae-score"))


def test_demo(studies, capsys):
    assert cli.main(["demo", "--out", "here", "--seed", "3", "--short"]) == 0
    out, config = studies.demo
    assert out == Path("here")
    assert (config.seed, config.concepts) == (3, SHORT.concepts)
    assert capsys.readouterr().out == "here/report.html\n"


def test_sae_score_prints_its_report(studies, capsys):
    assert cli.main(["sae", "score", "--out", "x", "--concepts", "fast"]) == 0
    assert capsys.readouterr().out == "x/report.html\n"
    assert studies.features.concepts == ("fast",)


def test_localize(studies, capsys):
    line = (
        "localize --concepts drums,violin --sites cross:2-5 --how key --windows 2 --pairs 8 "
        "--seeds 0 1,2 --steps 10 --guidance 2.5 --batch-rows 32 --tau 0.2 --audio --out runs/x"
    )
    assert cli.main(line.split()) == 0
    assert studies.localization == LocalizationConfig(
        concepts=("drums", "violin"),
        sites="cross:2-5",
        how="key",
        windows=2,
        pairs=8,
        seeds=(0, 1, 2),
        steps=10,
        guidance=2.5,
        batch_rows=32,
        tau=0.2,
        audio=True,
        out=Path("runs/x"),
    )
    assert capsys.readouterr().out == "runs/x\n"
    assert studies.page == Path("runs/x")
    assert not Path("runs").exists()  # the check leaves nothing behind


@pytest.mark.parametrize("command", ["localize", "steer"])
def test_help_names_the_page(command, capsys):
    assert cli.main([command, "--help"]) == 0
    assert "report.html" in capsys.readouterr().out


def test_localize_concepts(studies):
    assert cli.main(["localize"]) == 0
    assert studies.localization.concepts == tuple(DEFAULT_CONCEPTS)
    assert cli.main(["localize", "--concepts", "all"]) == 0
    assert studies.localization.concepts == tuple(CONCEPTS)


def test_localize_own_prompts(studies, tmp_path):
    text = "concept,clean_prompt,corrupted_prompt\ndrums,a with drums,a\ndrums,b with drums,b\n"
    path = write(tmp_path / "pairs.csv", text)
    assert cli.main(["localize", "--prompts", path]) == 0
    config = studies.localization
    assert config.concepts == ("drums",)
    assert config.prompts == {"drums": [("a with drums", "a"), ("b with drums", "b")]}


def test_capture(studies, capsys, tmp_path, monkeypatch):
    class Found(list):
        width = 160

    from sidechain.studies import capture

    def run(config):
        studies.capture = config
        config.out.mkdir()
        return {"cross:5": Found([0] * 65)}

    monkeypatch.setattr(capture, "run", run)
    prompts = write(tmp_path / "p.txt", "one\n\n two \n")
    line = (
        f"capture --prompts {prompts} --sites cross:5 --branches all --window 2:10 --every 4 "
        "--tokens 1: --dtype int8 --queue-mb 8 --shard-mb 2 --steps 12 "
        "--guidance 2 --seed 5 --batch-rows 4 --out x"
    )
    assert cli.main(line.split()) == 0
    assert capsys.readouterr().out == "x cross:5: 65 rows of 160\n"
    assert studies.capture == CaptureConfig(
        prompts=("one", "two"),
        sites="cross:5",
        branches="all",
        window=(2, 10),
        every=4,
        tokens=slice(1, None),
        dtype="int8",
        queue_bytes=8 << 20,
        shard_bytes=2 << 20,
        steps=12,
        guidance=2.0,
        batch_rows=4,
        seed=5,
        out=Path("x"),
    )


def test_windows_of_fractions(studies):
    assert cli.main(["capture", "--window", "0.25:1"]) == 0
    assert studies.capture.window == (0.25, 1.0)


def test_vector(studies, capsys, tmp_path):
    assert cli.main(["vector", "--concept", "drums", "--unit"]) == 0
    assert studies.vectors.normalise
    assert capsys.readouterr().out == "runs/vectors/drums.safetensors\n"
    path = write(tmp_path / "swing.csv", "positive,negative\nswing,plain\n")
    assert cli.main(["vector", "--prompts", path]) == 0
    assert studies.vectors.concept == "swing"
    assert studies.vectors.prompts == (("swing",), ("plain",))


def test_steer(studies):
    line = (
        "steer --concept drums --strengths -4,2,4 --sites cross:3 --prompts 8 --renorm --audio "
        "--arms localized,random --branches both_cond --steps 12 --guidance 2 --seed 5 --out x"
    )
    assert cli.main(line.split()) == 0
    assert studies.steering == SteeringConfig(
        concept="drums",
        strengths=(-4.0, 0.0, 2.0, 4.0),
        sites="cross:3",
        prompts=8,
        renorm=True,
        audio=True,
        arms=("localized", "random"),
        branches="both_cond",
        steps=12,
        guidance=2.0,
        seed=5,
        out=Path("x"),
    )
    assert studies.page == Path("x")


def test_steer_by_features(studies, tmp_path):
    line = (
        f"steer --concept drums --method sae --dictionaries {tmp_path} --features 8 "
        "--score diff --weighting none --out x"
    )
    assert cli.main(line.split()) == 0
    config = studies.steering
    assert (config.method, config.dictionaries, config.features) == ("sae", tmp_path, 8)
    assert (config.score, config.weighting) == ("diff", "none")


def test_steer_files(studies, tmp_path):
    vector = write(tmp_path / "v.safetensors", "")
    prompts = write(tmp_path / "p.txt", "one\n\n two \n")
    line = ["steer", "--vector", vector, "--prompts", prompts, "--strengths", "-2:2:5"]
    assert cli.main(line) == 0
    config = studies.steering
    assert config.vector == Path(vector)
    assert config.prompts == ("one", "two")
    assert config.strengths == (-2.0, -1.0, 0.0, 1.0, 2.0)
    assert config.sites is None
