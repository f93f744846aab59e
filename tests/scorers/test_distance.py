# SPDX-License-Identifier: Apache-2.0
"""Distances of samples against their formulas, and the digest of a function of one's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sidechain import InputError
from sidechain.scorers import Samples, load_distance
from sidechain.scorers.function import function_digest
from sidechain.testing import tiny_clip


def log_magnitudes(wave: np.ndarray, length: int) -> np.ndarray:
    """ln max(|STFT|, 1e-5) of a wave [n], frame by frame."""
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(length) / length)
    frames = range(0, len(wave) - length + 1, length // 4)
    spectra = [np.abs(np.fft.rfft(wave[i : i + length] * window)) for i in frames]
    return np.log(np.maximum(spectra, 1e-5))


def test_spectral():
    waves = torch.randn(3, 2, 600, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    waves[2] *= 0.0  # silence has a logarithm
    found = load_distance("spectral", "cpu").distance(Samples(waves=waves, rate=8000), [0, 0, 1])
    expected = [
        np.mean(
            [
                np.mean(
                    [
                        np.abs(
                            log_magnitudes(waves[a, c].numpy(), length)
                            - log_magnitudes(waves[b, c].numpy(), length)
                        ).mean()
                        for c in range(2)
                    ]
                )
                for length in (512, 128)  # 2048 is longer than the sound
            ]
        )
        for a, b in ((0, 0), (1, 0), (2, 1))
    ]
    assert found[0] == 0
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=1e-9)
    with pytest.raises(InputError, match="expected samples of sound, got images"):
        load_distance("spectral", "cpu").distance(Samples(images=torch.zeros(1, 3, 8, 8)), [0])


def test_features_of_a_tower_grow_with_the_difference(tmp_path):
    distance = load_distance(f"clip:{tiny_clip(tmp_path)}", "cpu")
    g = torch.Generator().manual_seed(0)
    image, noise = torch.rand(3, 16, 16, generator=g), torch.randn(3, 16, 16, generator=g)
    images = torch.stack([(image + a * noise).clamp(0, 1) for a in (0.0, 0.02, 0.3)])
    found = distance.distance(Samples(images=images), [0, 0, 0])
    assert found[0] == 0 and 0 < found[1] < found[2]
    assert torch.equal(distance.distance(Samples(images=images), [2, 2, 2])[0], found[2])


def test_a_function_is_known_by_its_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "scorer_of_mine.py").write_text("def one(samples, texts):\n    return 1\n")
    before = function_digest("scorer_of_mine:one")
    (tmp_path / "scorer_of_mine.py").write_text("def one(samples, texts):\n    return 2\n")
    assert function_digest("scorer_of_mine:one") != before
