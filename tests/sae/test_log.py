# SPDX-License-Identifier: Apache-2.0
"""Metrics of a training run: they arrive an interval late, their speed must not."""

from __future__ import annotations

import itertools
import json
import math
import time

import safetensors

from sidechain.sae import Provenance, Sae, SaeConfig
from sidechain.sae.training.log import METRICS, Log

FIGURES = {"fvu": 0.5, "l0": 4.0, "dead": 0.0}


def test_speed_is_that_of_the_steps_of_the_interval(tmp_path, monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))  # a second a step
    log = Log(tmp_path, total=25, done=3, rows=64, offset=0, progress=False)
    for _ in range(20):
        log.step()
    log.write({"step": 13, **FIGURES})  # ten seconds ago
    log.write(None)
    log.step()
    log.step()
    log.write({"step": 23, **FIGURES})
    log.write({"step": 25, **FIGURES})  # both at the end of the run
    log.close()
    lines = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert [line["step"] for line in lines] == [13, 23, 25]
    assert [line["tokens_per_s"] for line in lines] == [64.0, 64.0, 64.0]


def test_a_bar_that_cannot_be_drawn_is_left_out(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    log = Log(tmp_path, total=4, done=0, rows=64, offset=0)
    monkeypatch.setattr(type(log._bar), "update", full)
    monkeypatch.setattr(type(log._bar), "set_postfix_str", full)
    for step in (1, 2):
        log.step()
        log.write({"step": step, **FIGURES})
    log.close()
    assert len((tmp_path / METRICS).read_text().splitlines()) == 2


def test_a_dictionary_keeps_strict_json(tmp_path):
    """Metrics of the last interval go into its header, and may be undefined."""
    sae = Sae(SaeConfig(4, 8, "topk", k=2), provenance=Provenance(metrics={"fvu": math.nan}))
    sae.save(tmp_path / "sae.safetensors")
    with safetensors.safe_open(tmp_path / "sae.safetensors", framework="pt") as file:
        text = "".join(file.metadata().values())
    assert "NaN" not in text
    assert Sae.load(tmp_path / "sae.safetensors").provenance.metrics == {"fvu": None}
