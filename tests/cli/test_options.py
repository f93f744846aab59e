# SPDX-License-Identifier: Apache-2.0
"""Every option of every command is a field of its settings, and reaches it."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from sidechain._errors import InputError
from sidechain._options import defaults, options
from sidechain.cli import main as cli
from sidechain.cli import sae_train, store_import
from sidechain.cli.builder import flag_of, label
from sidechain.sae.features.scoring import ACTIVATIONS, METHODS
from sidechain.sae.training.loggers import LOGGERS
from sidechain.store.finite import POLICIES
from sidechain.store.importing import STORED
from sidechain.store.manifest import DTYPES
from sidechain.studies import config as shared
from sidechain.studies.capture.config import CaptureConfig
from sidechain.studies.features.config import ACTIVATIONS as OFFERED_ACTIVATIONS
from sidechain.studies.steering.config import BRANCH_MODES
from sidechain.taps.steer import MODES
from sidechain.vectors import WEIGHTINGS

SETTINGS = {name: cli.load(name).settings for name in cli.COMMANDS}
OPTIONS = [(name, field) for name, kind in SETTINGS.items() for field in options(kind)]
FILES = {
    "pairs.csv": "concept,clean_prompt,corrupted_prompt\ndrums,a with drums,a\n",
    "sides.csv": "positive,negative\nswing,plain\n",
    "prompts.txt": "one\ntwo\n",
    "own.safetensors": "",
}
#: Tried in turn, until one is a value of the field other than its default.
WORDS = (
    *("7", "0.5", "2:10", "1:", "cuda:1", "drums", "localized", "tensorboard", "aux_k=0", "512"),
    *("folder", "pairs.csv", "sides.csv", "prompts.txt", "own.safetensors", "zoo:music"),
    "spectral",
)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("folder", "given"):
        (tmp_path / name).mkdir()
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)


def settings_for(monkeypatch, name, *words):
    """What a command is run with."""
    found = []
    command = replace(cli.load(name), run=lambda settings, given: found.append(settings) or 0)
    monkeypatch.setattr(cli, "load", lambda _: command)
    needed = [f for f in options(SETTINGS[name]) if f not in defaults(SETTINGS[name])]
    before = [] if words and not words[0].startswith("-") else ["given"] * len(needed)
    assert cli.main([*name.split(), *words, *before]) == 0
    return found[0]


def in_place(name, field, word):
    """The words of a command with one for a field that has no flag, and any for the others."""
    needed = [f for f in options(SETTINGS[name]) if f not in defaults(SETTINGS[name])]
    return [word if f == field else "given" for f in needed if field in needed] or [word]


def example(name, field):
    """A word for an option, and the value it stands for."""
    option = options(SETTINGS[name])[field]
    default = defaults(SETTINGS[name]).get(field)
    for word in (*option.choices, *WORDS):
        given = [word] if option.many else word
        try:
            value = option.read("x", given)
            if option.probe is not None:
                option.probe("x", value)
        except (InputError, OSError, ValueError):
            continue
        if value != default:
            return word, value
    raise AssertionError(f"no example for {name}, {field}")


@pytest.mark.parametrize(("name", "field"), OPTIONS)
def test_an_option_reaches_its_field_and_no_other(name, field, monkeypatch):
    option = options(SETTINGS[name])[field]
    plain = settings_for(monkeypatch, name)
    if option.metavar is None:
        words, value = [flag_of(field, option)], True
    else:
        word, value = ("folder", "folder") if field == "model" else example(name, field)
        words = in_place(name, field, word) if option.positional else [flag_of(field, option), word]
    found = settings_for(monkeypatch, name, *words)
    assert getattr(found, field) == value
    assert replace(found, **{field: getattr(plain, field)}) == plain


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_field_is_an_option_with_help(name):
    kind = SETTINGS[name]
    assert [f.name for f in fields(kind)] == list(options(kind))
    labels = [label(field, option) for field, option in options(kind).items()]
    assert len(set(labels)) == len(labels)
    assert all(option.help for option in options(kind).values())


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_no_abbreviations_and_no_empty_values(name, capsys):
    flags = {flag_of(field, option) for field, option in options(SETTINGS[name]).items()}
    for field, option in options(SETTINGS[name]).items():
        if option.positional or option.metavar is None:
            continue
        flag = flag_of(field, option)
        needed = [f for f in options(SETTINGS[name]) if f not in defaults(SETTINGS[name])]
        line = [*name.split(), *["given"] * len(needed)]
        if flag[:-1] not in flags:  # "--scorer" is no long form of "--score"
            assert cli.main([*line, f"{flag[:-1]}=7"]) == 2
            assert "unrecognized arguments" in capsys.readouterr().err
        if not option.empty and not option.choices:
            assert cli.main([*line, flag, ""]) == 2
            assert flag in capsys.readouterr().err


def test_choices_are_those_of_the_library():
    assert tuple(METHODS) == shared.SCORES
    assert set(WEIGHTINGS) == set(shared.WEIGHTINGS)
    assert tuple(ACTIVATIONS) == OFFERED_ACTIVATIONS
    assert tuple(MODES) == BRANCH_MODES
    assert tuple(DTYPES) == options(CaptureConfig)["dtype"].choices
    assert tuple(LOGGERS) == sae_train.LOGGERS
    assert set(STORED) == set(store_import.STORED) and store_import.POLICIES == POLICIES


MODEL_COMMANDS = [name for name, kind in SETTINGS.items() if "model" in options(kind)] + ["demo"]


@pytest.mark.parametrize("name", MODEL_COMMANDS)
def test_device_and_dtype_reach_the_loader(name, monkeypatch, capsys):
    import torch

    from sidechain import zoo
    from sidechain.studies import common

    seen = []

    def music(device="cpu", dtype=None, folder=None):
        seen.append((device, dtype))
        raise KeyboardInterrupt

    monkeypatch.setattr(zoo, "music", music)
    monkeypatch.setattr(common, "check_device", lambda name: None)
    extra = {
        "vector": ["--concept", "drums"],
        "steer": ["--concept", "drums"],
        "sae train": ["cross:3", "--prompts", "prompts.txt"],
    }
    dtype = "--model-dtype" if name == "capture" else "--dtype"
    line = [*name.split(), *extra.get(name, []), "--device", "cuda:1", dtype, "bfloat16"]
    assert cli.main(line) == 130
    assert seen == [("cuda:1", torch.bfloat16)]


def test_a_device_that_is_not_there(capsys):
    assert cli.main(["vector", "--concept", "drums", "--device", "cuda:63"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("sidechain: error: --device: expected a device of this machine")
    assert error.count("\n") == 1
