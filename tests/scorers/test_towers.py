# SPDX-License-Identifier: Apache-2.0
"""CLAP and CLIP scores against transformers called by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sidechain import InputError
from sidechain.scorers import Samples, load_scorers
from sidechain.scorers.clap import resampled, windows
from sidechain.testing import tiny_clap, tiny_clip

TEXTS = ["a piano", "fast drums"]


def test_clap(tmp_path):
    from transformers import AutoProcessor, ClapModel

    (scorer,) = load_scorers([f"clap:{tiny_clap(tmp_path)}"]).values()
    waves = torch.randn(3, 2, 16_000, generator=torch.Generator().manual_seed(0)) * 0.1
    model, processor = ClapModel.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    sounds = list(waves.mean(1).numpy())
    inputs = processor(
        audio=sounds, text=TEXTS, sampling_rate=16_000, return_tensors="pt", padding=True
    )
    with torch.no_grad():
        made = model(**{**inputs, "is_longer": torch.zeros(3, 1, dtype=torch.bool)})
    expected = made.audio_embeds @ made.text_embeds.T
    found = scorer.scores(Samples(waves=waves, rate=16_000), TEXTS)
    torch.testing.assert_close(found, expected)


def test_clap_hears_all_windows_of_a_long_sound(tmp_path):
    (scorer,) = load_scorers([f"clap:{tiny_clap(tmp_path)}"]).values()
    long = torch.randn(2, 1, 24_000, generator=torch.Generator().manual_seed(1)) * 0.1
    long[0, :, 16_000:] *= 20  # the end of the first sound is another
    parts = []
    for sound in long:
        pieces = torch.stack([sound[:, :16_000], sound[:, 8_000:]])
        samples = Samples(waves=pieces, rate=16_000)
        parts.append(scorer.scores(samples, TEXTS))
        assert float((parts[-1][0] - parts[-1][1]).abs().max()) > 1e-6
    # The mean of two unit vectors has the direction of the mean, not its length.
    found = scorer.scores(Samples(waves=long, rate=16_000), TEXTS)
    ratio = torch.stack([p.mean(0) for p in parts]) / found
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-4, atol=1e-5)
    assert (ratio <= 1 + 1e-5).all()


def test_clip(tmp_path):
    from transformers import AutoProcessor, CLIPModel

    (scorer,) = load_scorers([f"clip:{tiny_clip(tmp_path)}"]).values()
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    model, processor = CLIPModel.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    pictures = [(i * 255).round().byte().permute(1, 2, 0).numpy() for i in images]
    with torch.no_grad():
        made = model(**processor(images=pictures, text=TEXTS, return_tensors="pt", padding=True))
    expected = made.image_embeds @ made.text_embeds.T
    torch.testing.assert_close(scorer.scores(Samples(images=images), TEXTS), expected)
    with pytest.raises(InputError, match="expected texts of at most 16 tokens"):
        scorer.scores(Samples(images=images), ["drums " * 40])


def test_resampling_keeps_a_tone_and_cuts_what_does_not_fit():
    time = np.arange(48_000) / 48_000
    tone, high = (np.sin(2 * np.pi * f * time)[None].astype("f4") for f in (440, 12_000))
    low = resampled(tone, 48_000, 16_000)[0, 500:-500]
    expected = np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)[500:-500]
    assert np.abs(low - expected).max() < 2e-3
    assert np.abs(resampled(high, 48_000, 16_000)[0, 500:-500]).max() < 1e-2


def test_windows_cover_a_long_sound():
    pieces = windows(np.arange(25), 10)
    assert [list(p[[0, -1]]) for p in pieces] == [[0, 9], [8, 17], [15, 24]]
    assert len(windows(np.arange(10), 10)) == 1
