# SPDX-License-Identifier: Apache-2.0
"""CLAP: cosine of a sound and a text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import gcd
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from .samples import Samples
from .texts import TowerScorer, embedding

#: Windows that the audio tower reads at once.
_BATCH = 16


class ClapScorer(TowerScorer):
    """A CLAP model of transformers as a scorer.

    s[b, j] = cos(mean over windows w of a_bw / |a_bw|, t_j), with a and t the projected outputs of
    the audio and the text tower. A sound is mixed to mono and resampled to the processor's rate. A
    longer one than the model reads is cut into the fewest windows that cover it, evenly spaced:
    the processor itself would read one place drawn at random, and the score would not repeat.

    Args:
        name: in tables.
        model: `ClapModel`.
        processor: its `ClapProcessor`.

    Source: Wu et al. 2023, arXiv:2211.06687.
    """

    def scores(self, samples: Samples, texts: Sequence[str]) -> Tensor:
        """Return cosines [B, texts]."""
        text = self._texts(texts)
        parts = [
            normalize(embedding(self._model.get_audio_features(**inputs)), dim=-1)
            for inputs in self._inputs(samples)
        ]
        windows = torch.cat(parts).unflatten(0, (len(samples), -1))  # [B, windows, D]
        return normalize(windows.mean(1), dim=-1) @ text.T

    def features(self, samples: Samples) -> list[Tensor]:
        """Return the stages of the audio tower, [B, C, positions of all windows]."""
        parts = [
            self._model.audio_model(**inputs, output_hidden_states=True).hidden_states
            for inputs in self._inputs(samples)
        ]
        stages = [torch.cat(stage).flatten(2) for stage in zip(*parts, strict=True)]
        return [
            stage.unflatten(0, (len(samples), -1)).transpose(1, 2).flatten(2) for stage in stages
        ]

    def _inputs(self, samples: Samples) -> Iterator[dict[str, Tensor]]:
        extractor = self._processor.feature_extractor
        sounds = mono(samples.waves(f"scorer {self.name}"))
        sounds = resampled(sounds, samples.rate or 0, extractor.sampling_rate)
        pieces = [piece for sound in sounds for piece in windows(sound, extractor.nb_max_samples)]
        for start in range(0, len(pieces), _BATCH):
            read = extractor(
                pieces[start : start + _BATCH],
                sampling_rate=extractor.sampling_rate,
                return_tensors="pt",
            )
            # Where no sound is longer than the model reads, it would mark one at random as such.
            longer = torch.zeros_like(torch.as_tensor(read["is_longer"]), dtype=torch.bool)
            device = self._model.device
            yield {
                "input_features": read["input_features"].to(device, torch.float32),
                "is_longer": longer.to(device),
            }


def mono(waves: Tensor) -> np.ndarray[Any, Any]:
    """Mix channels: [B, channels, n] to float32 [B, n]."""
    mixed: np.ndarray[Any, Any] = waves.float().mean(1).cpu().numpy()
    return mixed


def resampled(sounds: np.ndarray[Any, Any], rate: int, wanted: int) -> np.ndarray[Any, Any]:
    """Resample [B, n] by a polyphase filter that cuts what the new rate cannot hold."""
    if rate == wanted:
        return sounds
    from scipy.signal import resample_poly

    shared = gcd(rate, wanted)
    made: np.ndarray[Any, Any] = resample_poly(
        sounds.astype(np.float64), wanted // shared, rate // shared, axis=-1
    )
    return made.astype(np.float32)


def windows(sound: np.ndarray[Any, Any], length: int) -> list[np.ndarray[Any, Any]]:
    """Cut a sound [n] into the fewest windows of `length` that cover it, evenly spaced."""
    count = -(-len(sound) // length)
    if count <= 1:
        return [sound]
    starts = [round(i * (len(sound) - length) / (count - 1)) for i in range(count)]
    return [sound[start : start + length] for start in starts]
