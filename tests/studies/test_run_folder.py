# SPDX-License-Identifier: Apache-2.0
"""Run folders: fingerprints, old folders, damaged ones; vectors of one's own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from sidechain import InputError
from sidechain.io.run_folder import RunFolder
from sidechain.io.same import difference, digest, fingerprint
from sidechain.studies import localization as loc
from sidechain.studies import steering as st
from sidechain.studies.demo.config import SHORT, DemoConfig
from sidechain.studies.features.config import DictionaryConfig
from sidechain.vectors import SteeringVector

RUNS = Path(__file__).parents[1] / "data" / "runs"
OWN = {"concepts": ("drums",), "tau": 0.1 + 0.2, "pairs": 3}


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text())


def started(folder, **changes):
    """A run folder with one finished part."""
    config = loc.LocalizationConfig(**{**OWN, "out": folder, **changes})
    RunFolder(folder, "localize", config, {"model": "abc"}).save_part("a", pd.DataFrame({"x": [1]}))
    return config


def test_a_word_of_an_earlier_version_is_the_same_setting(tmp_path):
    config = DictionaryConfig(out=tmp_path / "run")
    RunFolder(config.out, "sae score", config).save_part("a", pd.DataFrame({"x": [1]}))
    known = manifest(config.out)
    assert known["config"]["activations"] == "relu"
    for word, now in (("open", "relu"), ("kept", "selected")):
        known["config"]["activations"], known["fingerprint"] = word, "of that version"
        (config.out / "manifest.json").write_text(json.dumps(known))
        same = replace(config, activations=word)
        assert same.activations == now
        RunFolder(config.out, "sae score", same)
    with pytest.raises(InputError, match="activations is"):
        RunFolder(config.out, "sae score", config)


class TestFingerprint:
    def test_is_the_same_on_every_machine(self, tmp_path):
        """Another folder, device, number of threads, hash seed and current folder."""
        started(tmp_path / "here")
        code = (
            "import sys; from pathlib import Path; from sidechain.io.run_folder import RunFolder; "
            "from sidechain.studies.localization import LocalizationConfig as C; "
            f"out = Path('there'); config = C(out=out, device='cuda', **{OWN!r}); "
            "RunFolder(out, 'localize', config, {'model': 'abc'})"
        )
        env = {**os.environ, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "2"}
        subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, check=True)
        one, two = manifest(tmp_path / "here"), manifest(tmp_path / "there")
        assert one["fingerprint"] == two["fingerprint"]
        assert str(tmp_path) not in json.dumps(one)

    def test_sees_settings_inputs_and_commands(self):
        facts = {"command": "a", "settings": {"x": 0.1, "y": [1]}, "inputs": {"model": "m"}}
        known = fingerprint(**facts)
        assert known == "8b722c821ac044487c4538d2da59f113916a265dac7d758ddedd15abae44fd2d"
        assert fingerprint(**dict(reversed(facts.items()))) == known
        for name, value in (
            ("command", "b"),
            ("settings", {"x": 0.30000000000000004 - 0.2, "y": [1]}),
            ("settings", {"x": 0.1, "y": [2]}),
            ("inputs", {"model": "n"}),
        ):
            assert fingerprint(**{**facts, name: value}) != known

    def test_digests_read_files_not_paths(self, tmp_path):
        for folder in ("a", "b"):
            (tmp_path / folder).mkdir()
            (tmp_path / folder / "w.bin").write_bytes(b"x" * (65 << 20))
        assert digest(tmp_path / "a") == digest(tmp_path / "b")
        with open(tmp_path / "b" / "w.bin", "r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"y")
        assert digest(tmp_path / "a") != digest(tmp_path / "b")


class TestLock:
    HOLD = (
        "import sys; from pathlib import Path; from sidechain.io.run_folder import RunFolder; "
        "from sidechain.studies.localization import LocalizationConfig as C; "
        "held = RunFolder(Path(sys.argv[1]), 'localize', C(out=Path(sys.argv[1]))); "
        "print('held', flush=True); sys.stdin.read()"
    )

    def test_another_process_is_refused_also_before_the_first_part(self, tmp_path):
        line = [sys.executable, "-c", self.HOLD, str(tmp_path / "run")]
        held = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert held.stdout.readline() == "held\n"
        other = loc.LocalizationConfig(out=tmp_path / "run", pairs=9)
        try:
            before = (tmp_path / "run" / "manifest.json").read_bytes()
            with pytest.raises(RuntimeError, match=rf"^--out: expected .* by pid {held.pid} on"):
                RunFolder(other.out, "localize", other)
            assert (tmp_path / "run" / "manifest.json").read_bytes() == before
        finally:
            held.kill()
            held.communicate()
        RunFolder(other.out, "localize", other)  # no part was finished: other settings may begin

    def test_one_process_opens_it_again(self, tmp_path):
        config = loc.LocalizationConfig(out=tmp_path)
        first = RunFolder(tmp_path, "localize", config)
        again = RunFolder(tmp_path, "localize", config)
        assert first._lock is again._lock
        RunFolder(tmp_path, "localize", config, lock=False)  # a process of the same run

    def test_half_files_are_removed(self, tmp_path):
        ours = (".manifest.json.abcd1234.part", "parts/.a.csv.abcd1234.part",
                "parts/pieces/.a.0-4.csv.abcd_234.part")  # fmt: skip
        theirs = ("notes.part", ".notes.part", "audio/.a.wav.abcd1234.part")
        for name in ours + theirs:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        RunFolder(tmp_path, "localize", loc.LocalizationConfig(out=tmp_path))
        assert not any((tmp_path / name).exists() for name in ours)
        assert all((tmp_path / name).exists() for name in theirs)


class TestSame:
    def test_names_what_differs(self, tmp_path):
        config = started(tmp_path / "run")
        message = r"got other settings \[pairs is 3 there, 4 here\]"
        with pytest.raises(InputError, match=message):
            RunFolder(config.out, "localize", replace(config, pairs=4), {"model": "abc"})
        with pytest.raises(InputError, match=r"model is \"abc\" there, \"xyz\" here"):
            RunFolder(config.out, "localize", config, {"model": "xyz"})
        with pytest.raises(InputError, match="command is"):
            RunFolder(config.out, "steer", config, {"model": "abc"})
        RunFolder(config.out, "localize", replace(config, device="cuda"), {"model": "abc"})

    def test_settings_that_are_new_count_as_their_defaults(self):
        assert difference({"a": 1}, {"a": 1, "b": 2}, {"b": 2}) is None
        assert difference({"a": 1}, {"a": 1, "b": 3}, {"b": 2}) == ("b", 2, 3)
        assert difference({"a": 1, "gone": 0}, {"a": 1}) == ("gone", 0, None)
        assert difference({"a": (1, 2)}, {"a": [1, 2]}) is None


class TestVersionOne:
    """Folders that the version before wrote, cut off after their first part."""

    def test_localization_goes_on(self, model, tmp_path):
        out = tmp_path / "run"
        shutil.copytree(RUNS / "localize", out)
        config = loc.LocalizationConfig(
            out=out, concepts=("drums", "violin"), pairs=1, steps=2, windows=2
        )
        with pytest.raises(InputError, match=r"tau is 0.1 there, 0.2 here"):
            loc.run(replace(config, tau=0.2))
        with pytest.raises(InputError, match=r"dtype is \"float32\" there"):
            loc.run(replace(config, dtype="bfloat16"))
        assert model.clips == 0
        part = (out / "parts" / "sites-drums-0.csv").read_bytes()
        loc.run(config)
        assert model.clips == 7 + 2 * 2  # of the other concept, and the best sites of both
        assert (out / "parts" / "sites-drums-0.csv").read_bytes() == part

    def test_steering_goes_on_with_its_vector(self, model, tmp_path):
        out = tmp_path / "run"
        shutil.copytree(RUNS / "steer", out)
        config = st.SteeringConfig(
            out=out,
            concept="drums",
            sites="cross:1",
            strengths=(0.0, 2.0),
            prompts=2,
            steps=2,
            batch_rows=3,
            arms=("localized", "random"),
        )
        st.run(config)
        assert model.clips == 3

    def test_a_demo(self, tmp_path):
        old = {
            name: value for name, value in vars(SHORT).items() if name not in ("device", "dtype")
        }
        (tmp_path / "localization").mkdir()
        (tmp_path / "manifest.json").write_text(json.dumps({"config_hash": "x", "config": old}))
        RunFolder(tmp_path, "demo", SHORT, {"model": "abc"})
        with pytest.raises(InputError, match="got other settings"):
            RunFolder(tmp_path, "demo", DemoConfig(), {"model": "abc"})


class TestDamage:
    @pytest.mark.parametrize("text", ["{", "[]", '{"config": 3}', "\x00"])
    def test_a_manifest(self, tmp_path, text):
        config = started(tmp_path / "run")
        path = config.out / "manifest.json"
        path.write_text(text)
        with pytest.raises(InputError, match="expected") as caught:
            RunFolder(config.out, "localize", config)
        assert str(path) in str(caught.value)

    @pytest.mark.parametrize("content", [b"", b"\n", b"\xff\xfe\x00", b'a,b\n"1'])
    def test_a_part(self, tmp_path, content):
        config = started(tmp_path / "run")
        path = config.out / "parts" / "a.csv"
        path.write_bytes(content)
        folder = RunFolder(config.out, "localize", config, {"model": "abc"})
        with pytest.raises(InputError, match="expected the table of a finished part") as caught:
            folder.part("a")
        assert str(path) in str(caught.value)


class TestOwnVector:
    @pytest.fixture
    def own(self, model, tmp_path):
        from sidechain.studies import vectors

        path = tmp_path / "swing.safetensors"
        prompts = (("a swinging flute", "a swinging piano"), ("a flute", "a piano"))
        vectors.run(vectors.VectorConfig(concept="swing", prompts=prompts, out=path, steps=2))
        return st.SteeringConfig(
            out=tmp_path / "run",
            vector=path,
            sites="cross:1",
            strengths=(0.0, 2.0),
            prompts=2,
            steps=2,
            batch_rows=8,
            arms=("localized",),
        )

    def test_is_scored_as_a_class_of_the_classifiers(self, own):
        found = st.run(replace(own, scored_as="jazz"))
        assert found.concept.name == "jazz"
        assert SteeringVector.load(own.vector).concept == "swing"

    def test_asks_for_the_class(self, own):
        with pytest.raises(
            InputError, match=r"--scored-as: expected one of piano, .*'swing'\], got"
        ):
            st.run(own)
        assert not own.out.exists()
