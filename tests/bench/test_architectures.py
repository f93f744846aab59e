# SPDX-License-Identifier: Apache-2.0
"""The table of every architecture at its defaults: its quick form, and where it is written."""

from __future__ import annotations

import json
import shutil

from sidechain.bench import architectures
from sidechain.sae import ARCHITECTURES
from sidechain.zoo import load
from sidechain.zoo.checksums import WEIGHTS


def test_the_quick_form_trains_every_architecture(tmp_path, capsys):
    out = tmp_path / "metrics.json"
    assert architectures.main(["--quick", "--out", str(out)]) == 0
    metrics = json.loads(out.read_text())["architectures"]
    trained = {case["architecture"] for case in architectures.CASES.values()}
    assert trained == set(ARCHITECTURES)
    assert metrics.keys() == architectures.CASES.keys()
    for name, row in metrics.items():
        assert row["fvu"] < (0.7 if name == "relu" else 0.5), name
        assert 2 < row["l0"] < 4, name  # 3 asked for
        assert row["dead"] < 0.3, name
    shown = capsys.readouterr().out
    assert shown.count("\n| ") == 1 + len(metrics)


def test_the_card_keeps_its_text_and_one_table(tmp_path):
    folder = tmp_path / "sae"
    shutil.copytree(WEIGHTS / load.SAES, folder)
    before = (folder / "README.md").read_text().split(architectures.START)[0].rstrip()
    for line in ("first", "second"):
        architectures.write_card(folder, [line])
    text = (folder / "README.md").read_text()
    assert text.startswith(before) and "second" in text and "first" not in text
    assert text.count(architectures.START) == text.count(architectures.END) == 1
    load.verify(folder)
