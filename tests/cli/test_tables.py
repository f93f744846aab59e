# SPDX-License-Identifier: Apache-2.0
"""`sidechain curves`, `impact` and `doctor`: published tables, own tables, readers that leave."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

from cli.support import write
from sidechain._version import __version__
from sidechain.cli import main as cli

ORACLES = Path(__file__).parents[1] / "data" / "oracles"


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


class TestDoctor:
    def test_text_and_json(self, capsys):
        assert cli.main(["doctor"]) == 0
        assert __version__ in capsys.readouterr().out
        assert cli.main(["doctor", "--json"]) == 0
        assert isinstance(json.loads(capsys.readouterr().out), dict)
