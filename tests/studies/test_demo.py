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
    heard = sorted(path.name for path in (tmp_path / "steering-drums" / "audio").iterdir())
    assert heard == ["000_localized_1.flac", "000_localized_2.flac", "000_none_0.flac"]
    path = report.write(result, tmp_path / "report.html")
    text = path.read_text()
    assert text.count("<audio") == 3
    assert all(part in text for part in ("cross:0", "Selected sites", "Arms compared, drums"))
    assert 'src="http' not in text

    # a second run reads everything
    calls = model.calls
    model.reset()
    again = demo.run(tmp_path, config)
    assert model.calls == 0 < calls
    assert again.localization.order == result.localization.order
    with pytest.raises(ValueError, match=r"--out: expected a new folder or the same settings"):
        demo.run(tmp_path, replace(config, seed=1))
