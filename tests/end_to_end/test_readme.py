# SPDX-License-Identifier: Apache-2.0
"""The examples of the readme run as printed, one after the other, with fewer pairs and steps."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FEWER = (
    (".pairs(50)", ".pairs(2)"),
    ("num_inference_steps=20", "num_inference_steps=2"),
    ("] * 3)", "] * 3, num_inference_steps=2)"),
    ('pipe("a happy violin tune")', 'pipe("a happy violin tune", num_inference_steps=2)'),
    ('pipe("a violin melody")', 'pipe("a violin melody", num_inference_steps=2)'),
    ("batches(4096", "batches(64"),
    ("buffer=1 << 18", "buffer=1 << 10"),
    ("tokens=2_000_000", "tokens=1024, batch=256, progress=False"),
    ("Planted(100_000", "Planted(10_000"),
)


def test_python_examples(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    for printed, shorter in FEWER:
        assert printed in code
        code = code.replace(printed, shorter)
    space: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), space)
    assert space["audio"].shape == (3, 1, 81920)
    assert space["cap"]["cross:3"].shape == (2, 1, 1, 160)
    assert space["maps"]["cross:3"].shape[:2] == (1, 1)
    assert space["batch"].x.shape == (64, 160)
    assert space["x_hat"].shape == (3, 160)
    assert space["finer"].config.k == 8 and "held_out_fvu" in space["finer"].provenance.metrics
    assert space["longer"].provenance.tokens > space["own"].provenance.tokens
