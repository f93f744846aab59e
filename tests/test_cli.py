# SPDX-License-Identifier: Apache-2.0
"""The command line: what reaches the studies, what is printed, and one line for bad input."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from sidechain import __main__
from sidechain._version import __version__
from sidechain.cli import main as cli

ORACLES = Path(__file__).parent / "data" / "oracles"


class Study(SimpleNamespace):
    """Stands for a study module: keeps the settings it is run with."""

    def __init__(self, config, **extra):
        self.settings = None
        super().__init__(**{config: lambda **settings: settings}, **extra)

    def run(self, settings):
        self.settings = settings


@pytest.fixture
def studies(monkeypatch, tmp_path):
    found = {
        "localization": Study("LocalizationConfig"),
        "vectors": Study("VectorConfig"),
        "steering": Study("SteeringConfig"),
        "capture": Study("CaptureConfig"),
        "demo": SimpleNamespace(calls=[]),
    }

    def run_demo(out, config):
        found["demo"].calls.append((out, config))
        return "result"

    found["demo"].run = run_demo
    found["demo"].settings = lambda *, seed, short: (seed, short)
    monkeypatch.setattr(cli, "_study", found.__getitem__)
    monkeypatch.setattr(cli, "_report", lambda name: SimpleNamespace(write=lambda _, path: path))
    monkeypatch.chdir(tmp_path)
    return found


def write(path, text):
    path.write_text(text)
    return str(path)


class TestTables:
    def test_curves(self, capsys):
        assert cli.main(["curves", str(ORACLES / "steering_piano.csv")]) == 0
        captured = capsys.readouterr()
        rows = list(csv.DictReader(io.StringIO(captured.out)))
        with open(ORACLES / "steering_expected.csv", newline="") as stream:
            printed = list(csv.DictReader(stream))
        assert captured.out.splitlines()[0] == (
            "method,concept,auc_muqt,auc_clap,smooth_muqt,smooth_clap"
        )
        assert captured.err == ""
        for row, expected in zip(rows, printed, strict=True):
            assert (row["method"], row["concept"]) == (expected["method"], expected["concept"])
            for column in ("auc_muqt", "auc_clap", "smooth_muqt", "smooth_clap"):
                assert abs(float(row[column]) - float(expected[column])) <= 0.0005 + 1e-6

    def test_impact(self, capsys):
        assert cli.main(["impact", str(ORACLES / "localization_impact.csv")]) == 0
        rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
        with open(ORACLES / "localization_expected.csv", newline="") as stream:
            printed = list(csv.DictReader(stream))
        assert list(rows[0]) == ["model", "block", "attn", "mean_impact", "functional"]
        for row, expected in zip(rows, printed, strict=True):
            assert row["block"] == expected["block"]
            assert abs(float(row["mean_impact"]) - float(expected["impact"])) <= 0.0005 + 1e-6
        assert [row["block"] for row in rows if row["functional"] == "true"] == ["tf7", "tf6"]

    def test_other_concepts_and_cutoff(self, capsys, tmp_path):
        lines = ["note,method,concept,alpha,lpaps,muqt,clap"]
        for method, slope in (("mine", 1.0), ("yours", 2.0)):
            lines += [f"x,{method},oboe,{a},{abs(a)},{slope * a}," for a in (-2, -1, 0, 1, 2)]
        table = write(tmp_path / "own.csv", "\n".join(lines))
        assert cli.main(["curves", table]) == 2
        error = capsys.readouterr().err
        assert error.startswith("sidechain: error: curves: expected rows of the cut-off methods")
        assert "oboe" in error
        assert error.count("\n") == 1
        assert cli.main(["curves", table, "--cutoff", "mine", "--mean"]) == 0
        assert capsys.readouterr().out.splitlines() == [
            "method,concept,auc_muqt,auc_clap,smooth_muqt,smooth_clap",
            "mine,oboe,2.000000,,0.000000,",
            "yours,oboe,4.000000,,0.000000,",
            "mine,mean,2.000000,,0.000000,",
            "yours,mean,4.000000,,0.000000,",
        ]

    def test_one_sided_table_is_blank_with_a_note(self, capsys, tmp_path):
        lines = ["method,concept,alpha,lpaps,muqt,clap", "a,oboe,0,0,0,0", "a,oboe,1,1,1,1"]
        table = write(tmp_path / "own.csv", "\n".join(lines))
        assert cli.main(["curves", table, "--cutoff", "a"]) == 0
        captured = capsys.readouterr()
        assert captured.out.splitlines()[1] == "a,oboe,,,,"
        assert "no negative alpha" in captured.err
        assert cli.main(["curves", table, "--cutoff", "a", "--direction", "positive"]) == 0
        assert capsys.readouterr().out.splitlines()[1].startswith("a,oboe,0.500000")

    def test_tau(self, capsys):
        table = str(ORACLES / "localization_impact.csv")
        assert cli.main(["impact", table, "--tau", "0.4"]) == 0
        assert capsys.readouterr().out.count("true") == 1

    def test_standard_input(self, capsys, monkeypatch):
        text = (ORACLES / "localization_impact.csv").read_text()
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        assert cli.main(["impact", "-"]) == 0
        assert capsys.readouterr().out.count("\n") == 25

    def test_reader_that_leaves_early(self):
        command = [sys.executable, "-m", "sidechain", "curves", str(ORACLES / "steering_piano.csv")]
        run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        run.stdout.close()
        assert run.stderr.read() == b""
        run.stderr.close()
        assert run.wait() == 0


#: How a vector is made unless told otherwise.
CAA = {
    "method": "caa",
    "dictionaries": None,
    "features": 20,
    "score": "tada",
    "weighting": "natural",
}


class TestStudies:
    def test_demo(self, studies, capsys):
        assert cli.main(["demo", "--out", "here", "--seed", "3", "--short"]) == 0
        assert studies["demo"].calls == [(Path("here"), (3, True))]
        assert capsys.readouterr().out == "here/report.html\n"

    def test_localize(self, studies, capsys):
        line = (
            "localize --concepts drums,violin --sites cross:2-5 --how key --windows 2 --pairs 8 "
            "--seeds 0 1,2 --steps 10 --guidance 2.5 --batch-rows 32 --tau 0.2 --out runs/x"
        )
        assert cli.main(line.split()) == 0
        assert studies["localization"].settings == {
            "model": "zoo:music",
            "concepts": ("drums", "violin"),
            "prompts": None,
            "sites": "cross:2-5",
            "how": "key",
            "windows": 2,
            "pairs": 8,
            "seeds": (0, 1, 2),
            "steps": 10,
            "guidance": 2.5,
            "batch_rows": 32,
            "tau": 0.2,
            "out": Path("runs/x"),
        }
        assert capsys.readouterr().out == "runs/x\n"
        assert not Path("runs").exists()  # the check leaves nothing behind

    def test_localize_concepts(self, studies):
        from sidechain.zoo.music.concepts import CONCEPTS, DEFAULT_CONCEPTS

        assert cli.main(["localize"]) == 0
        assert studies["localization"].settings["concepts"] == tuple(DEFAULT_CONCEPTS)
        assert cli.main(["localize", "--concepts", "all"]) == 0
        assert studies["localization"].settings["concepts"] == tuple(CONCEPTS)

    def test_localize_own_prompts(self, studies, tmp_path):
        text = "concept,clean_prompt,corrupted_prompt\ndrums,a with drums,a\ndrums,b with drums,b\n"
        path = write(tmp_path / "pairs.csv", text)
        assert cli.main(["localize", "--prompts", path]) == 0
        settings = studies["localization"].settings
        assert settings["concepts"] == ("drums",)
        assert settings["prompts"] == {"drums": [("a with drums", "a"), ("b with drums", "b")]}

    def test_capture(self, studies, capsys, tmp_path, monkeypatch):
        class Found(list):
            width = 160

        def run(settings):
            studies["capture"].settings = settings
            return {"cross:5": Found([0] * 65)}

        monkeypatch.setattr(studies["capture"], "run", run)
        prompts = write(tmp_path / "p.txt", "one\n\n two \n")
        line = (
            f"capture --prompts {prompts} --sites cross:5 --passes all --window 2:10 --every 4 "
            "--tokens 1: --dtype int8 --queue-mb 8 --shard-mb 2 --steps 12 "
            "--guidance 2 --seed 5 --batch-rows 4 --out x"
        )
        assert cli.main(line.split()) == 0
        assert capsys.readouterr().out == "x cross:5: 65 rows of 160\n"
        assert studies["capture"].settings == {
            "model": "zoo:music",
            "prompts": ("one", "two"),
            "sites": "cross:5",
            "passes": "all",
            "window": (2, 10),
            "every": 4,
            "tokens": slice(1, None),
            "dtype": "int8",
            "queue_bytes": 8 << 20,
            "shard_bytes": 2 << 20,
            "steps": 12,
            "guidance": 2.0,
            "batch_rows": 4,
            "seed": 5,
            "out": Path("x"),
        }
        assert cli.main(["capture", "--window", "0.25:1"]) == 0
        settings = studies["capture"].settings
        assert settings["window"] == (0.25, 1.0)
        assert (settings["prompts"], settings["tokens"]) == (100, None)
        assert settings["dtype"] == "float16"

    def test_vector(self, studies, capsys, tmp_path):
        assert cli.main(["vector", "--concept", "drums", "--unit"]) == 0
        settings = studies["vectors"].settings
        assert settings == {
            "model": "zoo:music",
            "concept": "drums",
            "prompts": None,
            "pairs": 50,
            "sites": "cross:*",
            "steps": 20,
            "guidance": 3.0,
            "batch_rows": 64,
            "seed": 0,
            "normalise": True,
            **CAA,
            "out": Path("runs/vectors/drums.safetensors"),
        }
        assert capsys.readouterr().out == "runs/vectors/drums.safetensors\n"
        path = write(tmp_path / "swing.csv", "positive,negative\nswing,plain\n")
        assert cli.main(["vector", "--prompts", path]) == 0
        settings = studies["vectors"].settings
        assert settings["concept"] == "swing"
        assert settings["prompts"] == (("swing",), ("plain",))

    def test_steer(self, studies, tmp_path):
        line = (
            "steer --concept drums --strengths -4,2,4 --sites cross:3 --prompts 8 --renorm --audio "
            "--arms localized,random --passes both_cond --steps 12 --guidance 2 --seed 5 --out x"
        )
        assert cli.main(line.split()) == 0
        assert studies["steering"].settings == {
            "model": "zoo:music",
            "vector": None,
            "concept": "drums",
            "strengths": (-4.0, 0.0, 2.0, 4.0),
            "sites": "cross:3",
            "prompts": 8,
            "arms": ("localized", "random"),
            "passes": "both_cond",
            "renorm": True,
            "audio": True,
            "steps": 12,
            "guidance": 2.0,
            "batch_rows": 64,
            "seed": 5,
            **CAA,
            "out": Path("x"),
        }

    def test_steer_by_features(self, studies, tmp_path):
        line = (
            f"steer --concept drums --method sae --dictionaries {tmp_path} --features 8 "
            "--score diff --weighting none --out x"
        )
        assert cli.main(line.split()) == 0
        settings = studies["steering"].settings
        assert {name: settings[name] for name in CAA} == {
            "method": "sae",
            "dictionaries": tmp_path,
            "features": 8,
            "score": "diff",
            "weighting": "none",
        }

    def test_steer_files(self, studies, tmp_path):
        vector = write(tmp_path / "v.safetensors", "")
        prompts = write(tmp_path / "p.txt", "one\n\n two \n")
        line = ["steer", "--vector", vector, "--prompts", prompts, "--strengths", "-2:2:5"]
        assert cli.main(line) == 0
        settings = studies["steering"].settings
        assert settings["vector"] == Path(vector)
        assert settings["prompts"] == ("one", "two")
        assert settings["strengths"] == (-2.0, -1.0, 0.0, 1.0, 2.0)
        assert settings["sites"] is None


BAD = [
    ("steer --vector drums.csv --method sae", "--method: expected no --vector"),
    ("steer --concept drums --dictionaries nowhere", "--dictionaries: expected a folder"),
    ("steer --concept drums --method sae --features 0", "--features: expected at least 1"),
    ("sae score --concepts tuba", "--concepts: expected piano"),
    ("sae score --prompts 0", "--prompts: expected at least 1"),
    ("localize --concepts drums,tuba", r"--concepts: expected piano \| .*, got 'tuba'"),
    ("localize --steps 0", "--steps: expected at least 1, got 0"),
    ("localize --steps many", "--steps: expected a whole number, got 'many'"),
    ("localize --guidance nan", "--guidance: expected a finite number, got 'nan'"),
    ("localize --guidance -1", "--guidance: expected at least 0, got -1"),
    ("localize --pairs 0", "--pairs: expected at least 1"),
    ("localize --windows 0", "--windows: expected at least 1"),
    ("localize --seeds 1 1", "--seeds: expected every seed once"),
    ("localize --seeds -1", "--seeds"),
    ("localize --tau inf", "--tau: expected a finite number"),
    ("localize --batch-rows 0", "--batch-rows: expected at least 1"),
    ("localize --how query", "invalid choice: 'query'"),
    ("localize --out wrong.csv", "--out: expected a folder, got the file"),
    ("localize --out wrong.csv/below", "--out: expected a path below folders"),
    ("localize --out /proc/nothing", "--out: expected a place that can be written"),
    ("localize --model zoo:speech", "--model: expected zoo:music or a folder"),
    ("localize --model nowhere", "--model: expected zoo:music or a folder of a saved pipeline"),
    ("localize --prompts nowhere.csv", "No such file or directory: nowhere.csv"),
    ("localize --prompts wrong.csv", "expected columns concept,clean_prompt,corrupted_prompt"),
    ("localize --prompts tuba.csv", "--prompts, column concept: expected piano"),
    ("localize --prompts drums.csv --concepts fast", "expected pairs for .*, got none for fast"),
    ("capture --prompts 0", "--prompts: expected at least 1"),
    ("capture --prompts nowhere.txt", "No such file or directory: nowhere.txt"),
    ("capture --prompts empty.txt", "--prompts: expected one prompt per line"),
    ("capture --window 3", "--window: expected A:B, got '3'"),
    ("capture --window 3:3", "--window: expected A < B in A:B, got '3:3'"),
    ("capture --window 0.5:2", "--window: expected fractions 0 <= A < B <= 1"),
    ("capture --window a:b", "--window: expected a finite number, got 'a'"),
    ("capture --every 0", "--every: expected at least 1, got 0"),
    ("capture --tokens 1", "--tokens: expected A:B or A:B:STEP, got '1'"),
    ("capture --tokens 1:x", "--tokens: expected A:B or A:B:STEP"),
    ("capture --tokens ::-1", "--tokens: expected STEP >= 1"),
    ("capture --dtype float64", "invalid choice: 'float64'"),
    ("capture --policy spill", "unrecognized arguments: --policy spill"),
    ("capture --queue-mb 0", "--queue-mb: expected at least 1"),
    ("capture --shard-mb x", "--shard-mb: expected a whole number"),
    ("capture --passes both", "invalid choice: 'both'"),
    ("capture --out wrong.csv", "--out: expected a folder, got the file"),
    ("vector", "expected --concept NAME or --prompts"),
    ("vector --concept tuba", "--concept: expected piano"),
    ("vector --concept all", "--concept: expected piano .*, got 'all'"),
    ("vector --concept drums --out vector.pt", r"--out: expected a file ending in \.safetensors"),
    ("vector --prompts wrong.csv", "expected columns positive,negative"),
    ("steer", "one of the arguments --vector --concept is required"),
    ("steer --vector v --concept drums", "not allowed with"),
    ("steer --vector nowhere.safetensors", "--vector: expected a file"),
    ("steer --concept drums --strengths nan", "--strengths: expected a finite number, got 'nan'"),
    ("steer --concept drums --strengths -1,inf", "--strengths: .* finite number, got 'inf'"),
    ("steer --concept drums --strengths 1,,2", "--strengths: expected a finite number, got ''"),
    ("steer --concept drums --strengths 2,2", "--strengths: expected every strength once"),
    ("steer --concept drums --strengths 4:1:3", "--strengths: expected lo < hi"),
    ("steer --concept drums --strengths 1:4:1", "--strengths lo:hi:n, n: expected at least 2"),
    ("steer --concept drums --strengths 1:4", "--strengths: expected a,b,c or lo:hi:n"),
    ("steer --concept drums --arms some", r"--arms: expected localized \| all .*, got 'some'"),
    ("steer --concept drums --passes both", "invalid choice: 'both'"),
    ("steer --concept drums --prompts 0", "--prompts: expected at least 1"),
    ("steer --concept drums --prompts empty.txt", "--prompts: expected one prompt per line"),
    ("steer --concept drums --seed -1", "--seed"),
    ("demo --seed x", "--seed: expected a whole number"),
    ("curves nowhere.csv", "No such file or directory: nowhere.csv"),
    ("curves .", "Is a directory"),
    ("curves wrong.csv", "curves: expected columns method,concept,alpha,lpaps,muqt,clap"),
    ("impact wrong.csv", "impact: expected columns model,metric,concept,block,attn,impact"),
    ("impact wrong.csv --tau nan", "--tau: expected a finite number"),
    ("dance", "invalid choice: 'dance'"),
]


@pytest.mark.parametrize(("line", "match"), BAD, ids=[line for line, _ in BAD])
def test_bad_input(line, match, studies, capsys, tmp_path):
    write(tmp_path / "wrong.csv", "a,b\n1,2\n")
    write(tmp_path / "tuba.csv", "concept,clean_prompt,corrupted_prompt\ntuba,a,b\n")
    write(tmp_path / "drums.csv", "concept,clean_prompt,corrupted_prompt\ndrums,a,b\n")
    write(tmp_path / "empty.txt", "\n\n")
    before = sorted(tmp_path.iterdir())
    assert cli.main(line.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("sidechain: error: ")
    assert captured.err.count("\n") == 1
    assert re.search(match, captured.err), captured.err
    assert sorted(tmp_path.iterdir()) == before
    assert studies["demo"].calls == []
    assert all(studies[name].settings is None for name in studies if name != "demo")


class TestErrors:
    def fail(self, monkeypatch, error):
        def run_demo(out, config):
            raise error

        study = SimpleNamespace(run=run_demo, settings=lambda **_: None)
        monkeypatch.setattr(cli, "_study", lambda name: study)
        return cli.main(["demo"])

    @pytest.mark.parametrize(
        "error", [ValueError("a\nb"), TypeError("a b"), NotImplementedError("a b"), OSError("a b")]
    )
    def test_one_line(self, monkeypatch, capsys, error):
        assert self.fail(monkeypatch, error) == 2
        assert capsys.readouterr().err == "sidechain: error: a b\n"

    def test_foreign_runtime_errors_show_their_origin(self, monkeypatch):
        with pytest.raises(RuntimeError, match="out of cheese"):
            self.fail(monkeypatch, RuntimeError("out of cheese"))

    def test_own_runtime_errors_are_one_line(self):
        source = "def fail():\n    raise RuntimeError('tap never fired')\n"
        space = {}
        exec(compile(source, str(Path(cli.__file__).parent / "taps" / "x.py"), "exec"), space)
        with pytest.raises(RuntimeError) as caught:
            space["fail"]()
        assert cli._expected(caught.value)

    def test_traceback_on_request(self, monkeypatch):
        monkeypatch.setattr(cli, "_study", lambda name: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            cli.main(["demo"])
        with pytest.raises(ValueError, match="expected at least 0"):
            cli.main(["--traceback", "demo", "--seed=-1"])

    def test_interrupt(self, monkeypatch, capsys):
        assert self.fail(monkeypatch, KeyboardInterrupt()) == 130
        assert capsys.readouterr().err == "sidechain: interrupted\n"


class TestHelp:
    def test_help_names_every_command(self, capsys):
        assert cli.main(["--help"]) == 0
        text = capsys.readouterr().out
        for command in cli.COMMANDS:
            words = command.split()
            assert f"\n    {words[0]} " in text
            assert cli.main([*words, "--help"]) == 0
        assert cli.main([]) == 0

    def test_version(self, capsys):
        assert cli.main(["--version"]) == 0
        assert capsys.readouterr().out == f"sidechain {__version__}\n"

    def test_help_imports_nothing_heavy(self):
        code = (
            "import sys; from sidechain.cli import main as cli; cli.main(['--help']); "
            "heavy = {'matplotlib', 'scipy', 'pandas', 'diffusers', 'transformers', 'librosa'}; "
            "sys.exit(' '.join(heavy & set(sys.modules)) or 0)"
        )
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr


class TestDoctor:
    def test_text_and_json(self, capsys):
        assert cli.main(["doctor"]) == 0
        assert __version__ in capsys.readouterr().out
        assert cli.main(["doctor", "--json"]) == 0
        assert isinstance(json.loads(capsys.readouterr().out), dict)

    def test_module_runs(self):
        run = subprocess.run(
            [sys.executable, "-m", "sidechain", "--version"], capture_output=True, text=True
        )
        assert run.stdout == f"sidechain {__version__}\n"
        assert __main__.main is cli.main
