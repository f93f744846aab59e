# SPDX-License-Identifier: Apache-2.0
"""The short demo, end to end on a tiny model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sidechain.studies.demo import page as report
from sidechain.studies.demo import run as demo


def test_settings():
    assert demo.settings(seed=4, short=True) == replace(demo.SHORT, seed=4)
    full = demo.settings()
    assert set(full.steered) <= set(full.concepts)
    assert 0.0 in full.strengths


def test_end_to_end(model, tmp_path, monkeypatch):
    # Griffin-Lim takes seconds and has its own tests
    noise = np.random.default_rng(0).normal(0, 0.1, 81920).astype(np.float32)
    monkeypatch.setattr(
        type(model.pipe.codec), "audio", lambda self, mels: np.stack([noise] * len(mels))
    )
    config = demo.settings(short=True)
    result = demo.run(tmp_path, config)
    assert set(result.steering) == {"drums"}
    assert set(result.seconds) == {"localization", "vectors", "sweeps", "audio"}
    (clips,) = result.clips
    assert clips.mels.shape == (3, 256, 64)
    assert clips.audio.shape == (3, 81920)
    assert [list(p) for p in clips.probabilities] == [["latent", "mel"]] * 3
    path = report.write(result, tmp_path / "report.html")
    text = path.read_text()
    assert text.count("<audio") >= 3
    assert "cross:0" in text
    assert 'src="http' not in text

    # a second run reads everything but the clips to hear
    calls = model.calls
    model.reset()
    again = demo.run(tmp_path, config)
    assert model.calls == 1 < calls
    assert again.localization.order == result.localization.order
    with pytest.raises(ValueError, match=r"--out: expected a new folder or the same settings"):
        demo.run(tmp_path, replace(config, seed=1))
