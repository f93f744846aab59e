# SPDX-License-Identifier: Apache-2.0
"""The linear codec: an orthonormal basis, unit variance, the same audio from the same mels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sidechain.zoo.music.codec import LinearMelCodec, log_mel

RANK = 40


@pytest.fixture(scope="module")
def mels():
    """Log-mels [30, 256, 64] whose stacked frames span 40 directions and a little noise."""
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(RANK, 256)) * np.geomspace(3.0, 0.3, RANK)[:, None]
    rows = rng.normal(size=(30 * 64, RANK)) @ mixing / 16 + 0.01 * rng.normal(size=(30 * 64, 256))
    return (rows - 0.7).reshape(30, 256, 64).astype(np.float32)


@pytest.fixture(scope="module")
def fitted(mels):
    codec = LinearMelCodec()
    facts = codec.fit(mels, chunk=7)
    return codec, facts


def test_fit(fitted, mels):
    codec, facts = fitted
    gram = codec.basis @ codec.basis.T
    torch.testing.assert_close(gram, torch.eye(64), rtol=0, atol=1e-5)
    assert 0.99 < facts["variance_kept"] <= 1.0
    rows = torch.from_numpy(mels.reshape(-1, 256))
    torch.testing.assert_close(codec.mean, rows.mean(0), rtol=1e-4, atol=1e-5)


def test_fit_does_not_depend_on_the_chunks(fitted, mels):
    other = LinearMelCodec()
    other.fit(mels, chunk=500)
    signs = (other.basis * fitted[0].basis).sum(1).sign()[:RANK, None]
    torch.testing.assert_close(
        other.basis[:RANK] * signs, fitted[0].basis[:RANK], rtol=1e-3, atol=1e-4
    )


def test_latents_have_unit_mean_variance(fitted, mels):
    codec, _ = fitted
    latents = codec.encode(torch.from_numpy(mels))
    assert latents.shape == (30, 64, 64)
    variance = latents.permute(1, 0, 2).reshape(64, -1).var(dim=1, correction=0)
    assert float(variance.mean()) == pytest.approx(1.0, rel=1e-3)
    # partial whitening: the variance of a latent is the standard deviation of its direction
    direction = (codec.basis @ torch.from_numpy(mels.reshape(-1, 256) - codec.mean.numpy()).T).std(
        dim=1
    )
    ratio = variance[:RANK] / direction[:RANK]
    torch.testing.assert_close(ratio, ratio[:1].expand(RANK), rtol=1e-2, atol=0)


def test_reconstruction(fitted, mels):
    codec, _ = fitted
    original = torch.from_numpy(mels)
    latents = codec.encode(original)
    decoded = codec.decode(latents)
    assert decoded.shape == original.shape
    assert float((decoded - original).square().mean().sqrt()) < 0.012
    torch.testing.assert_close(codec.encode(decoded), latents, rtol=1e-3, atol=1e-3)


def test_saving(fitted, tmp_path):
    codec, _ = fitted
    codec.save_pretrained(tmp_path)
    again = LinearMelCodec.from_pretrained(tmp_path, local_files_only=True)
    for name, value in codec.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)


@pytest.fixture(scope="module")
def tone():
    seconds = np.arange(16_000) / 16_000
    return (0.5 * np.sin(2 * np.pi * 440 * seconds)).astype(np.float32)


class TestAudio:
    def test_log_mel(self, tone):
        mel = log_mel(np.stack([tone, 0 * tone]))
        assert mel.shape == (2, 50, 64)
        assert mel.dtype == np.float32
        assert np.ptp(mel[1]) == 0
        assert mel[1, 0, 0] == pytest.approx(np.log(1e-2) / 2.5)
        assert len(set(mel[0, 5:45].argmax(axis=1))) == 1

    def test_audio(self, tone):
        codec = LinearMelCodec()
        mels = torch.from_numpy(log_mel(np.stack([tone, 0 * tone])))
        first = codec.audio(mels, iterations=4)
        assert first.shape == (2, 16_000)
        assert first.dtype == np.float32
        assert np.array_equal(first, codec.audio(mels, iterations=4))
        assert np.abs(first).max() <= 0.95
        assert np.abs(first[1]).max() < 1e-3
        spectrum = np.abs(np.fft.rfft(first[0]))
        assert abs(int(spectrum.argmax()) - 440) < 25  # one mel band at 440 Hz is 45 Hz wide

    def test_loud_mels_do_not_clip(self):
        audio = LinearMelCodec().audio(torch.full((1, 20, 64), 9.0), iterations=2)
        assert np.abs(audio).max() == pytest.approx(0.95, rel=1e-5)
