# SPDX-License-Identifier: Apache-2.0
"""Bad input: one line that names the option or the file, exit code 2, nothing left behind."""

from __future__ import annotations

import re
import shlex

import pytest

from cli.support import write
from sidechain.cli import main as cli

BAD = [
    ("steer --vector wrong.csv --method sae", "--method: expected no --vector"),
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
    ("localize --tau -5", "--tau: expected at least 0, got -5"),
    ("localize --seeds 99999999999999999999", "--seeds: expected at most 8796093022207"),
    ("localize --seed 1", "unrecognized arguments: --seed"),
    ("localize --pair 3", "unrecognized arguments: --pair"),
    ("localize --device tpu", "--device: expected cpu, cuda"),
    ("localize --dtype int8", "--dtype: invalid choice: 'int8'"),
    ("localize --config nowhere", "No such file or directory: nowhere"),
    ("localize --config .", "--config: expected a run folder with manifest.json"),
    ("localize --config wrong.csv", "wrong.csv: expected JSON"),
    ("localize --batch-rows 0", "--batch-rows: expected at least 1"),
    ("localize --how query", "invalid choice: 'query'"),
    ("localize --out wrong.csv", "--out: expected a folder, got the file"),
    ("localize --out wrong.csv/below", "--out: expected a path below folders"),
    ("localize --out /proc/nothing", "--out: expected a place that can be written"),
    ("localize --out ''", "--out: expected a value, got ''"),
    ("localize --model zoo:speech", "--model: expected zoo:music, the folder"),
    ("localize --model nowhere", "--model: expected .* or a hub id, got 'nowhere'"),
    ("localize --prompts nowhere.csv", "No such file or directory: nowhere.csv"),
    ("localize --prompts wrong.csv", "expected columns concept,clean_prompt,corrupted_prompt"),
    ("localize --prompts tuba.csv", "--prompts, column concept: expected piano"),
    ("localize --prompts drums.csv --concepts fast", "expected pairs for .*, got none for fast"),
    ("localize --call height", "--call: expected KEY=VALUE, got 'height'"),
    ("localize --call 1=2", "--call: expected KEY=VALUE, got '1=2'"),
    ("localize --scorer clap", "--scorer: expected zoo, clap:FOLDER.*, got 'clap'"),
    ("localize --scorer zoo --scorer zoo", "--scorer: expected every scorer once"),
    ("localize --batch-rows some", "--batch-rows: expected a whole number, got 'some'"),
    ("steer --concept drums --distance far", "--distance: expected scorer, spectral, .*'far'"),
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
    ("capture --policy spill", "unrecognized arguments: --policy"),
    ("capture --queue-mb 0", "--queue-mb: expected at least 1"),
    ("capture --shard-mb x", "--shard-mb: expected a whole number"),
    ("capture --branches both", "invalid choice: 'both'"),
    ("capture --out wrong.csv", "--out: expected a folder, got the file"),
    ("vector", "expected --concept NAME or --prompts"),
    ("vector --concept tuba", "--concept: expected piano"),
    ("vector --concept all", "--concept: expected piano .*, got 'all'"),
    ("vector --concept drums --out vector.pt", r"--out: expected a file ending in \.safetensors"),
    ("vector --prompts wrong.csv", "expected columns positive,negative"),
    ("steer", "expected either --vector FILE or --concept NAME, got neither"),
    ("steer --vector wrong.csv --concept drums", "--vector FILE or --concept NAME, got both"),
    ("steer --concept tuba", "--concept: expected piano"),
    ("steer --vector wrong.csv --scored-as tuba", "--scored-as: invalid choice: 'tuba'"),
    ("steer --vector nowhere.safetensors", "--vector: expected a file"),
    ("steer --concept drums --strengths nan", "--strengths: expected a finite number, got 'nan'"),
    ("steer --concept drums --strengths -1,inf", "--strengths: .* finite number, got 'inf'"),
    ("steer --concept drums --strengths 1,,2", "--strengths: expected a finite number, got ''"),
    ("steer --concept drums --strengths 2,2", "--strengths: expected every strength once"),
    ("steer --concept drums --strengths 4:1:3", "--strengths: expected lo < hi"),
    ("steer --concept drums --strengths 1:4:1", "--strengths lo:hi:n, n: expected at least 2"),
    ("steer --concept drums --strengths 1:4", "--strengths: expected a,b,c or lo:hi:n"),
    ("steer --concept drums --arms some", r"--arms: expected localized \| all .*, got 'some'"),
    ("steer --concept drums --branches both", "invalid choice: 'both'"),
    ("steer --concept drums --prompts 0", "--prompts: expected at least 1"),
    ("steer --concept drums --prompts empty.txt", "--prompts: expected one prompt per line"),
    ("steer --concept drums --seed -1", "--seed"),
    ("demo --seed x", "--seed: expected a whole number"),
    ("demo --seed 99999999999999999999", "--seed: expected at most 8796093022207"),
    ("steer --concept drums --seed 9223372036854775807", "--seed: expected at most"),
    ("impact wrong.csv --tau -5", "--tau: expected at least 0, got -5"),
    ("impact", "sidechain impact: expected TABLE.csv, got none"),
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
    assert cli.main(shlex.split(line)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("sidechain: error: ")
    assert captured.err.count("\n") == 1
    assert re.search(match, captured.err), captured.err
    assert sorted(tmp_path.iterdir()) == before
    assert set(vars(studies).values()) == {None}
