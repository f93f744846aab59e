# SPDX-License-Identifier: Apache-2.0
"""An outside witness: the musicnn tagger, trained by others on real music (MagnaTagATune).

It shares nothing with the scorers of this package (data, labels, front end, authors), so agreement
with it is evidence. Architecture: Pons & Serra 2019, arXiv:1909.06654; the weights are ISC licensed
(weights/musicnn/LICENSE), converted to float16 from the MTT_musicnn checkpoint of PyPI's
musicnn 0.1.0, with its batch normalisations folded into a scale and a shift.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from librosa.filters import mel as mel_filters
from torch import Tensor, nn

from ..checksums import WEIGHTS, verify

SAMPLE_RATE = 16_000
N_FFT, HOP, N_MELS = 512, 256, 96
PATCH_FRAMES = 187  # 3 seconds, the length the network was trained on

#: The tags in the order of the probabilities. Spellings that mean the same are separate outputs.
# fmt: off
TAGS = (
    "guitar", "classical", "slow", "techno", "strings", "drums", "electronic", "rock", "fast",
    "piano", "ambient", "beat", "violin", "vocal", "synth", "female", "indian", "opera", "male",
    "singing", "vocals", "no vocals", "harpsichord", "loud", "quiet", "flute", "woman",
    "male vocal", "no vocal", "pop", "soft", "sitar", "solo", "man", "classic", "choir", "voice",
    "new age", "dance", "male voice", "female vocal", "beats", "harp", "cello", "no voice", "weird",
    "country", "metal", "female voice", "choral",
)
# fmt: on


#: Tags that speak for and against a concept. Only concepts that the tags have words for: trumpet,
#: saxophone, xylophone, jazz, happy and sad have no witness here. tests/zoo/test_musicnn.py has the
#: AUC of `Heard.evidence` for each, measured on rendered clips: 0.77 (tempo) to 0.99 (drums).
#: Clips sent through the zoo's codec and Griffin-Lim give 0.76 (classical) to 0.93 (guitar): expect
#: no more of generated music.
WITNESSES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "piano": (("piano",), ()),
    "guitar": (("guitar",), ()),
    "violin": (("violin",), ("cello",)),
    "cello": (("cello",), ()),
    "flute": (("flute",), ()),
    "drums": (("drums",), ()),
    "vocals": (("choir", "choral"), ()),
    "fast": (("fast",), ("slow",)),
    "slow": (("slow",), ("fast",)),
    "rock": (("rock",), ()),
    "techno": (("techno", "dance"), ()),
    "classical": (("classical", "classic", "strings"), ()),
}


@dataclass(frozen=True)
class Heard:
    """Output of the tagger for clips: tag probabilities and two embeddings, means over patches."""

    probabilities: Tensor  # [B, 50]
    mean_pool: Tensor  # [B, 753]
    penultimate: Tensor  # [B, 200]

    @property
    def tags(self) -> dict[str, Tensor]:
        """Probability [B] of every tag by name."""
        return dict(zip(TAGS, self.probabilities.unbind(1), strict=True))

    def evidence(self, concept: str) -> Tensor:
        """Compute the evidence of the tags for `concept`, [B]: mean log-odds for minus against it.

        Raises:
            ValueError: a concept that is not in `WITNESSES`.
        """
        if concept not in WITNESSES:
            raise ValueError(f"evidence: expected one of {', '.join(WITNESSES)}, got {concept!r}")
        odds = dict(zip(TAGS, self.probabilities.logit(eps=1e-6).unbind(1), strict=True))
        pro, contra = WITNESSES[concept]
        score = torch.stack([odds[tag] for tag in pro]).mean(dim=0)
        return score - torch.stack([odds[tag] for tag in contra]).mean(dim=0) if contra else score

    @property
    def embedding(self) -> Tensor:
        """Both embeddings side by side, [B, 953]."""
        return torch.cat([self.mean_pool, self.penultimate], dim=1)


class _Affine(nn.Module):
    """Frozen batch normalisation, channels last: y = x scale + shift."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self.shift = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


class _Filters(nn.Module):
    """A filter bank slid over time and pitch; each filter keeps its maximum over pitch."""

    def __init__(self, filters: int, frames: int, bands: int) -> None:
        super().__init__()
        self.frames = frames
        self.conv = nn.Conv2d(1, filters, (frames, bands))
        self.norm = _Affine(filters)

    def forward(self, x: Tensor) -> Tensor:
        # An even kernel has one more frame of padding after than before, as in TensorFlow.
        before = (self.frames - 1) // 2
        padded = nn.functional.pad(x, (0, 0, before, self.frames - 1 - before))
        maps = torch.relu(self.conv(padded[:, None]))  # [N, filters, T, pitch]
        # The scale may be negative, so the maximum comes after it.
        hidden: Tensor = self.norm(maps.permute(0, 2, 3, 1))
        return hidden.amax(dim=2)  # [N, T, filters]


class _Line(nn.Module):
    """Seven-frame convolution over time, rectifier, normalisation: [N, T, C] to [N, T, width]."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels, width, 7, padding=3)
        self.norm = _Affine(width)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.norm(torch.relu(self.conv(x.transpose(1, 2))).transpose(1, 2))
        return hidden


class MusicTagger(ModelMixin, ConfigMixin):  # type: ignore[misc, unused-ignore]
    """musicnn: 50 MagnaTagATune tags of 16 kHz audio, 0.79 M parameters, for inference.

    Log-mel -> timbral filters (tall) and temporal filters (long), maximum over pitch -> three
    residual convolutions over time -> maximum and mean over time -> two dense layers.
    """

    @register_to_config
    def __init__(
        self,
        timbral: int = 204,
        temporal: int = 51,
        width: int = 64,
        penultimate: int = 200,
        tags: tuple[str, ...] = TAGS,
    ) -> None:
        """Create an untrained tagger; `music_tagger` loads the shipped one.

        Args:
            timbral: filters of each of the two timbral banks (38 and 67 bands tall).
            temporal: filters of each of the three temporal banks (128, 64 and 32 frames long).
            width: channels of the residual convolutions.
            penultimate: units before the tags.
            tags: names of the outputs.
        """
        super().__init__()
        self.entry = _Affine(1)
        shapes = [(timbral, 7, 38), (timbral, 7, 67)]
        shapes += [(temporal, frames, 1) for frames in (128, 64, 32)]
        self.front = nn.ModuleList(_Filters(*shape) for shape in shapes)
        channels = sum(shape[0] for shape in shapes)
        self.middle = nn.ModuleList(_Line(c, width) for c in (channels, width, width))
        pooled = 2 * (channels + 3 * width)
        self.pool_norm = _Affine(pooled)
        self.dense = nn.Linear(pooled, penultimate)
        self.dense_norm = _Affine(penultimate)
        self.head = nn.Linear(penultimate, len(tags))

    def forward(self, patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits [N, 50], mean_pool [N, 753], penultimate [N, 200] of [N, 187, 96]."""
        hidden = self.entry(patches[..., None])[..., 0]
        stages = [torch.cat([bank(hidden) for bank in self.front], dim=2)]  # [N, T, 561]
        stages.append(self.middle[0](stages[0]))
        for line in list(self.middle)[1:]:
            stages.append(line(stages[-1]) + stages[-1])
        features = torch.cat(stages, dim=2)  # [N, T, 753]
        mean_pool = features.mean(dim=1)
        # Maximum and mean of a channel lie next to each other in the weights.
        pooled = torch.stack([features.amax(dim=1), mean_pool], dim=2).flatten(1)
        penultimate = self.dense_norm(torch.relu(self.dense(self.pool_norm(pooled))))
        return self.head(penultimate), mean_pool, penultimate

    @torch.no_grad()
    def hear(self, audio: Tensor | np.ndarray, *, chunk: int = 1) -> Heard:
        """Compute tag probabilities and embeddings of clips, means over their 3-second patches.

        Clips are computed one by one, so a clip's result does not depend on its batch.

        Args:
            audio: mono clips [B, samples] at 16 kHz, floating point, at least 47 616 samples.
            chunk: patches computed at once, about 30 MB of activations each; on CPU 1 is fastest.

        Returns:
            `Heard`, float32 on the tagger's device. Deterministic: yes.

        Raises:
            TypeError: audio that is not floating point.
            ValueError: audio of another shape or too short; chunk below 1.
        """
        if chunk < 1:
            raise ValueError(f"music_tagger: expected chunk >= 1, got {chunk}")
        clips = _checked(torch.as_tensor(audio))
        heard: list[tuple[Tensor, Tensor, Tensor]] = []
        for clip in clips.split(1):
            patches = cut_patches(log_mel(clip.to(self.device)))[0].to(self.dtype)
            parts = [self(piece) for piece in patches.split(chunk)]
            logits, pooled, last = (torch.cat(each).float() for each in zip(*parts, strict=True))
            heard.append((logits.sigmoid().mean(dim=0), pooled.mean(dim=0), last.mean(dim=0)))
        return Heard(*(torch.stack(each) for each in zip(*heard, strict=True)))

    def tags(self, audio: Tensor | np.ndarray, *, chunk: int = 1) -> Tensor:
        """Probabilities [B, 50] of `TAGS` for clips [B, samples] at 16 kHz; see `hear`."""
        return self.hear(audio, chunk=chunk).probabilities


def log_mel(audio: Tensor) -> Tensor:
    """Compute log-mel frames as musicnn was trained on.

    y = log10(10000 m + 1), m = float16(mel power spectrum), 96 Slaney mel bands.

    The float16 step is part of the training data. Upstream also scales in float16 and overflows
    for m > 6.5 (loud music); here the scaling is float32.

    Args:
        audio: mono clips [B, samples] at 16 kHz, floating point.

    Returns:
        Frames [B, 1 + samples // 256, 96] float32 on the device of `audio`.

    Raises:
        TypeError: audio that is not floating point.
        ValueError: audio of another shape or shorter than one patch.
    """
    samples = _checked(audio).float()
    window = torch.hann_window(N_FFT, device=audio.device)
    spectrum = torch.stft(
        samples, N_FFT, HOP, window=window, pad_mode="reflect", return_complex=True
    )
    power = spectrum.abs().square().transpose(1, 2)  # [B, frames, 257]
    mel = power @ torch.from_numpy(_mel_filters()).to(audio.device).T
    stored = mel.clamp_max(torch.finfo(torch.float16).max).half().float()
    return torch.log10(10_000.0 * stored + 1.0)


def _checked(audio: Tensor) -> Tensor:
    if not audio.is_floating_point():
        raise TypeError(f"music_tagger: expected floating-point audio, got {audio.dtype}")
    least = (PATCH_FRAMES - 1) * HOP
    if audio.ndim != 2 or audio.shape[0] < 1 or audio.shape[1] < least:
        raise ValueError(
            f"music_tagger: expected audio [B, samples] with at least {least} samples "
            f"[3 seconds at 16 kHz], got {list(audio.shape)}"
        )
    return audio


@lru_cache(maxsize=1)
def _mel_filters() -> np.ndarray:
    filters: np.ndarray = mel_filters(sr=SAMPLE_RATE, n_fft=N_FFT, n_mels=N_MELS)
    return filters


def cut_patches(frames: Tensor) -> Tensor:
    """Cut evenly spaced patches [B, P, 187, 96] that cover frames [B, T, 96].

    As few as possible; a remainder of less than a tenth of a patch is dropped.
    """
    total = frames.shape[1]
    count = math.ceil(total / PATCH_FRAMES - 0.1)
    starts = torch.linspace(0, total - PATCH_FRAMES, count).long().tolist()
    return torch.stack([frames[:, start : start + PATCH_FRAMES] for start in starts], dim=1)


def music_tagger(
    device: str | torch.device = "cpu", folder: Path | str | None = None
) -> MusicTagger:
    """Load the shipped musicnn tagger (MTT_musicnn), float32, in evaluation mode.

    Raises:
        FileNotFoundError: no weights there.
        ValueError: a damaged weight file.

    Example:
        >>> heard = sidechain.zoo.music_tagger().hear(audio)
        >>> heard.tags["flute"]
    """
    path = Path(folder) if folder is not None else WEIGHTS / "musicnn"
    verify(path)
    tagger: Any = MusicTagger.from_pretrained(
        path, torch_dtype=torch.float32, local_files_only=True
    )
    loaded: MusicTagger = tagger.eval().requires_grad_(False).to(device)
    return loaded
