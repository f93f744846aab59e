# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import pytest
import torch

from sidechain.scorers.zoo import ZooScorer
from sidechain.studies import common, models
from sidechain.testing import tiny_pipeline


class Model:
    """A tiny music pipeline with tiny random scorers, and a count of what it generates."""

    def __init__(self, layers: int = 3) -> None:
        from sidechain.zoo.music.scorer import LatentScorer, MelScorer

        self.pipe = tiny_pipeline("music", layers=layers)
        torch.manual_seed(0)
        mel = MelScorer(channels=(4, 8, 8), width=16)
        mel.codec.load_state_dict(self.pipe.codec.state_dict())
        self.scorers = {"latent": LatentScorer(width=16).eval(), "mel": mel.eval()}
        self.subject = models.MusicSubject(self.pipe)
        self.clips = 0
        self.calls = 0
        self.stop_after: int | None = None
        self._generate = common.generate

    def generate(self, *args: Any, **call: Any) -> Any:
        if self.calls == self.stop_after:
            raise KeyboardInterrupt
        latents = self._generate(*args, **call)
        self.calls += 1
        self.clips += len(latents)
        return latents

    def reset(self, stop_after: int | None = None) -> None:
        self.calls = self.clips = 0
        self.stop_after = stop_after


@pytest.fixture(scope="session")
def shared_model() -> Model:
    return Model()


@pytest.fixture
def model(shared_model: Model, monkeypatch: pytest.MonkeyPatch) -> Model:
    """What the studies load instead of the shipped weights."""
    shared_model.reset()
    monkeypatch.setattr(models, "load", lambda *_: models.MusicSubject(shared_model.pipe))
    scorers = lambda *_: {n: ZooScorer(n, s) for n, s in shared_model.scorers.items()}  # noqa: E731
    monkeypatch.setattr(common, "load_scorers", scorers)
    monkeypatch.setattr(common, "generate", shared_model.generate)
    return shared_model
