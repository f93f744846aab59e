# SPDX-License-Identifier: Apache-2.0
"""Distances between samples: feature maps of a scorer, log spectra, LPIPS."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._errors import InputError
from ..metrics.distance import feature_distance
from .protocol import Scorer
from .samples import Samples

#: Window lengths of the spectra; a length is left out where a sound is shorter.
FFTS = (2048, 512, 128)
_FLOOR = 1e-5  # of a magnitude, so that silence has a logarithm


class FeatureDistance:
    """Distance in the feature maps of a scorer's network, see `feature_distance`.

    With CLAP it is LPAPS-like, with CLIP LPIPS-like: unweighted, on the tower's hidden states.
    """

    def __init__(self, scorer: Scorer) -> None:
        self.name, self._scorer = f"features of {scorer.name}", scorer

    def distance(self, samples: Samples, origin: Sequence[int]) -> Tensor:
        """Return [B]."""
        with torch.no_grad():
            stages = self._scorer.features(samples)
        return feature_distance(stages, [stage[list(origin)] for stage in stages])


class SpectralDistance:
    """Mean absolute difference of log-magnitude spectra, mean over window lengths and channels.

    d = mean over lengths L of mean |ln max(|STFT_L(a)|, 1e-5) - ln max(|STFT_L(b)|, 1e-5)|, with a
    Hann window and a hop of L / 4.
    """

    name = "log-spectral"

    def distance(self, samples: Samples, origin: Sequence[int]) -> Tensor:
        """Return [B]."""
        waves = samples.waves("--distance spectral")
        waves = waves if waves.dtype == torch.float64 else waves.float()
        lengths = [length for length in FFTS if length <= waves.shape[-1]] or [FFTS[-1]]
        found = []
        for length in lengths:
            logs = _log_spectrum(waves, length)
            found.append((logs - logs[list(origin)]).abs().flatten(1).mean(1))
        return torch.stack(found).mean(0)


def _log_spectrum(waves: Tensor, length: int) -> Tensor:
    """Return ln of the magnitudes, [B, channels, bins, frames]."""
    batch, channels, count = waves.shape
    if count < length:
        waves = torch.nn.functional.pad(waves, (0, length - count))
    window = torch.hann_window(length, dtype=waves.dtype, device=waves.device)
    spectrum = torch.stft(
        waves.flatten(0, 1), length, length // 4, window=window, center=False, return_complex=True
    )
    return spectrum.abs().clamp_min(_FLOOR).log().unflatten(0, (batch, channels))


class LpipsDistance:
    """LPIPS with AlexNet, by the package `lpips`.

    Raises:
        InputError: the package is not installed, or its weights are not on this machine.

    Source: Zhang et al. 2018, arXiv:1801.03924.
    """

    name = "lpips"

    def __init__(self, device: str) -> None:
        try:
            import lpips
        except ImportError:
            raise InputError(
                "--distance lpips: expected the package lpips, got none: pip install lpips, or "
                "--distance clip:..."
            ) from None
        checkpoints = Path(torch.hub.get_dir()) / "checkpoints"
        if not any(checkpoints.glob("alexnet-*.pth")):
            raise InputError(
                f"--distance lpips: expected the weights of AlexNet in {checkpoints}, got none"
            )
        try:
            self._network: Any = lpips.LPIPS(net="alex", verbose=False).eval().to(device)
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"--distance lpips: expected its weights on this machine, got {error}"
            ) from None

    def distance(self, samples: Samples, origin: Sequence[int]) -> Tensor:
        """Return [B]."""
        images = samples.images("--distance lpips").float() * 2 - 1
        with torch.no_grad():
            found: Tensor = self._network(images, images[list(origin)])
        return found.flatten()
