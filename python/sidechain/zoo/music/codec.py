# SPDX-License-Identifier: Apache-2.0
"""A fixed linear autoencoder between audio, log-mel frames and latents.

Four mel frames are one latent step: PCA of the stacked 4 x 64 values to 64 numbers, each scaled by
(standard deviation)^-1/2 (partial whitening), the whole to unit mean variance. The decoder is the
transpose. It takes the place of a VAE and has the same interface.

librosa is imported only where audio is made or read, so a host that works on latents can do without
it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

FLOOR = 1e-2  # smallest mel magnitude; 60-70 dB below the loudest partials
OFFSET, SPREAD = 0.0, 2.5  # log-mel values are (ln m - OFFSET) / SPREAD


def log_mel(
    audio: np.ndarray,
    *,
    sample_rate: int = 16_000,
    n_fft: int = 1024,
    hop: int = 320,
    n_mels: int = 64,
) -> np.ndarray:
    """Log-mel magnitudes of `audio` [..., samples] as [..., samples // hop, n_mels] float32."""
    import librosa

    mel = librosa.feature.melspectrogram(
        y=audio,
        sr=sample_rate,
        n_fft=n_fft,
        hop_length=hop,
        n_mels=n_mels,
        fmin=30.0,
        power=1.0,
        norm=None,
    )
    frames = audio.shape[-1] // hop
    scaled = (np.log(np.maximum(mel, FLOOR)) - OFFSET) / SPREAD
    return np.swapaxes(scaled[..., :frames], -1, -2).astype(np.float32)


class LinearMelCodec(ModelMixin, ConfigMixin):  # type: ignore[misc, unused-ignore]
    """Linear mel autoencoder: latents [B, 64, 64] <-> log-mel [B, 256, 64] <-> audio [B, 81920].

    Latents are [B, channels, steps] at 12.5 steps per second. `fit` computes the basis; the
    weights are saved and loaded like any diffusers model.
    """

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 64,
        frames_per_step: int = 4,
        n_mels: int = 64,
        sample_rate: int = 16_000,
        n_fft: int = 1024,
        hop: int = 320,
    ) -> None:
        """Create an empty codec (zero basis); load or `fit` it before use."""
        super().__init__()
        width = frames_per_step * n_mels
        self.mean: Tensor
        self.basis: Tensor
        self.scale: Tensor
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("basis", torch.zeros(latent_channels, width))
        self.register_buffer("scale", torch.ones(latent_channels))

    def fit(self, mels: np.ndarray, *, chunk: int = 500) -> dict[str, float]:
        """Set the basis from log-mels [N, frames, n_mels]; returns the share of variance kept."""
        config: Any = self.config
        width = config.frames_per_step * config.n_mels
        total = np.zeros(width)
        square = np.zeros((width, width))
        count = 0
        for start in range(0, len(mels), chunk):
            rows = np.asarray(mels[start : start + chunk], np.float64).reshape(-1, width)
            total += rows.sum(0)
            square += rows.T @ rows
            count += len(rows)
        mean = total / count
        values, vectors = np.linalg.eigh(square / count - np.outer(mean, mean))
        order = np.argsort(values)[::-1][: config.latent_channels]
        deviation = np.sqrt(np.maximum(values[order], 1e-12))
        scale = deviation**-0.5
        scale /= np.sqrt(np.mean((deviation * scale) ** 2))  # mean variance of the latents = 1
        self.mean.copy_(torch.from_numpy(mean))
        self.basis.copy_(torch.from_numpy(vectors[:, order].T.copy()))
        self.scale.copy_(torch.from_numpy(scale))
        return {"variance_kept": float(values[order].sum() / values.sum())}

    def encode(self, mels: Tensor) -> Tensor:
        """Encode log-mels [B, frames, n_mels] to latents [B, channels, frames / 4]."""
        config: Any = self.config
        stacked = mels.reshape(mels.shape[0], -1, config.frames_per_step * config.n_mels)
        return (((stacked - self.mean) @ self.basis.T) * self.scale).transpose(1, 2)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents [B, channels, steps] to log-mels [B, 4 x steps, n_mels]."""
        config: Any = self.config
        stacked = (latents.transpose(1, 2) / self.scale) @ self.basis + self.mean
        return stacked.reshape(latents.shape[0], -1, config.n_mels)

    def audio(self, mels: Tensor, *, iterations: int = 32) -> np.ndarray:
        """Invert log-mels [B, frames, n_mels] to audio [B, hop x frames] float32 by Griffin-Lim.

        The linear spectrum is the non-negative part of the mel filters' pseudo-inverse; phases come
        from librosa's Griffin-Lim with a fixed seed, so equal mels give equal audio.
        """
        import librosa
        from librosa.filters import mel as mel_filters

        config: Any = self.config
        filters = mel_filters(
            sr=config.sample_rate, n_fft=config.n_fft, n_mels=config.n_mels, fmin=30.0, norm=None
        )
        values = mels.detach().to("cpu", torch.float32).numpy().clip(-4.0, 4.0)
        # One frame more than the mel has, repeated: librosa frames the padded audio with it.
        values = np.concatenate([values, values[:, -1:]], axis=1)
        magnitude = np.exp(values * SPREAD + OFFSET) - FLOOR
        spectrum = np.maximum(np.linalg.pinv(filters) @ np.swapaxes(magnitude, -1, -2), 0.0)
        wave = librosa.griffinlim(
            spectrum,
            n_iter=iterations,
            hop_length=config.hop,
            n_fft=config.n_fft,
            length=config.hop * mels.shape[1],
            random_state=0,
        )
        peak = np.abs(wave).max(axis=-1, keepdims=True)
        scaled: np.ndarray = (wave * np.minimum(1.0, 0.95 / np.maximum(peak, 1e-9))).astype(
            np.float32
        )
        return scaled
