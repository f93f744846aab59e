# SPDX-License-Identifier: Apache-2.0
"""`--config`: settings of a run folder or a file, overridden by other options."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cli.support import write
from sidechain.cli import main as cli
from sidechain.io.run_folder import RunFolder, write_settings
from sidechain.studies.capture import CaptureConfig
from sidechain.studies.localization import LocalizationConfig
from sidechain.studies.steering import SteeringConfig

RUNS = Path(__file__).parents[1] / "data" / "runs"


def test_a_run_is_replayed(studies, tmp_path):
    config = LocalizationConfig(
        concepts=("drums",),
        prompts={"drums": [("a with drums", "a")]},
        seeds=(3, 4),
        tau=0.25,
        windows=2,
        out=tmp_path / "first",
    )
    RunFolder(config.out, "localize", config)
    assert cli.main(["localize", "--config", "first", "--out", "second"]) == 0
    assert studies.localization == replace(config, out=Path("second"))
    assert cli.main(["localize", "--config", "first", "--out", "second", "--seeds", "5"]) == 0
    assert studies.localization == replace(config, out=Path("second"), seeds=(5,))


def test_values_with_a_notation_of_their_own(studies, tmp_path):
    config = CaptureConfig(
        prompts=("one", "two"), window=(0.25, 0.5), tokens=slice(1, None, 2), queue_bytes=5 << 20
    )
    write_settings(tmp_path / "store", "capture", config)
    assert cli.main(["capture", "--config", "store"]) == 0
    assert studies.capture == config


def test_a_switch_is_turned_off_again(studies, tmp_path):
    RunFolder(tmp_path / "run", "steer", SteeringConfig(concept="drums", renorm=True))
    assert cli.main(["steer", "--config", "run"]) == 0
    assert studies.steering.renorm
    assert cli.main(["steer", "--config", "run", "--no-renorm", "--concept", "fast"]) == 0
    assert (studies.steering.renorm, studies.steering.concept) == (False, "fast")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("own.json", '{"concepts": ["drums"], "tau": 0.3, "seeds": [1, 2]}'),
        ("own.json", '{"command": "localize", "config": {"concepts": "drums", "tau": "0.3", '
         '"seeds": "1,2"}}'),
        ("own.yaml", "concepts: drums\ntau: 0.3\nseeds: [1, 2]\n"),
    ],
)  # fmt: skip
def test_files(studies, tmp_path, name, text):
    write(tmp_path / name, text)
    assert cli.main(["localize", "--config", name]) == 0
    assert studies.localization == LocalizationConfig(concepts=("drums",), tau=0.3, seeds=(1, 2))


def test_run_folders_of_the_version_before(studies):
    known = json.loads((RUNS / "localize" / "manifest.json").read_text())["config"]
    assert cli.main(["localize", "--config", str(RUNS / "localize"), "--out", "new"]) == 0
    assert studies.localization.pairs == known["pairs"] == 1
    assert list(studies.localization.concepts) == known["concepts"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"command": "steer", "config": {}}', "expected settings of 'localize' in own.json, got"),
        ('{"wings": 2}', "--config: expected settings of model, .*, got 'wings' in own.json"),
        ('{"pairs": 0}', "--pairs: expected at least 1, got 0"),
        ('{"how": "query"}', "--how: expected one of context, key, value, got 'query'"),
        ('{"concepts": ["tuba"]}', "--concepts: expected piano"),
        ('{"concepts": 3}', "--concepts: expected a list, got 3"),
        ('{"pairs": true}', "--pairs: expected a whole number, got True"),
        ("[1]", "own.json: expected a JSON object, got list"),
        ("{", "own.json: expected JSON"),
    ],
)
def test_bad_files(studies, tmp_path, capsys, text, message):
    import re

    write(tmp_path / "own.json", text)
    assert cli.main(["localize", "--config", "own.json"]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert error.count("\n") == 1
    assert studies.localization is None
