# SPDX-License-Identifier: Apache-2.0
"""Two scorers of generated music: independent classifiers of every attribute.

They differ in input (latents / decoded log-mel), architecture (1-D residual / 2-D then dilated
1-D), data (even / odd clips) and augmentation, so that what fools one need not fool the other.
"""

from __future__ import annotations

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from .attributes import ATTRIBUTES
from .codec import LinearMelCodec


class _Residual1d(nn.Module):
    def __init__(self, width: int, kernel: int, dilation: int = 1) -> None:
        super().__init__()
        pad = dilation * (kernel // 2)
        self.norm = nn.GroupNorm(8, width)
        self.first = nn.Conv1d(width, width, kernel, padding=pad, dilation=dilation)
        self.second = nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.second(nn.functional.gelu(self.first(self.norm(x))))
        return x + hidden


class Scorer(ModelMixin, ConfigMixin):  # type: ignore[misc, unused-ignore]
    """Base of the scorers: `stages` is the network, the rest reads it."""

    #: attribute -> classes, in the order of the probabilities.
    attributes = ATTRIBUTES
    heads: nn.ModuleDict

    def stages(self, latents: Tensor) -> list[Tensor]:
        """Feature maps [B, C_i, ...] of latents [B, 64, 64], from fine to coarse."""
        raise NotImplementedError

    def embedding(self, latents: Tensor) -> Tensor:
        """Mean and maximum over time of the last stage, [B, 2 C]."""
        return self._pool(self.stages(latents)[-1])

    def forward(self, latents: Tensor) -> dict[str, Tensor]:
        """Logits [B, classes] of every attribute."""
        embedding = self.embedding(latents)
        return {name: head(embedding) for name, head in self.heads.items()}

    @torch.no_grad()
    def probabilities(self, latents: Tensor, *, chunk: int = 64) -> dict[str, Tensor]:
        """Probabilities [B, classes] of every attribute of latents [B, 64, 64].

        Raises:
            ValueError: latents of another shape.
        """
        if latents.ndim != 3 or latents.shape[1:] != (64, 64):
            raise ValueError(
                f"scorer: expected latents of shape [B, 64, 64], got {list(latents.shape)}"
            )
        parts = [self(piece) for piece in latents.to(self.device, self.dtype).split(chunk)]
        return {
            name: torch.cat([part[name] for part in parts]).softmax(dim=1) for name in self.heads
        }

    @staticmethod
    def _pool(features: Tensor) -> Tensor:
        flat = features.flatten(2)
        return torch.cat([flat.mean(dim=2), flat.amax(dim=2)], dim=1)

    @staticmethod
    def _make_heads(width: int) -> nn.ModuleDict:
        return nn.ModuleDict(
            {name: nn.Linear(2 * width, len(classes)) for name, classes in ATTRIBUTES.items()}
        )


class LatentScorer(Scorer):
    """1-D residual network on latents."""

    @register_to_config
    def __init__(self, width: int = 96) -> None:
        """`width`: channels throughout."""
        super().__init__()
        self.stem = nn.Conv1d(64, width, 5, padding=2)
        self.blocks = nn.ModuleList(_Residual1d(width, 7, dilation) for dilation in (1, 2, 4, 1))
        self.heads = self._make_heads(width)

    def stages(self, latents: Tensor) -> list[Tensor]:
        """See `Scorer.stages`: the stem and four blocks, [B, 96, 64] each."""
        features = [self.stem(latents)]
        for block in self.blocks:
            features.append(block(features[-1]))
        return features


class MelScorer(Scorer):
    """2-D convolutions on the decoded log-mel, then dilated 1-D ones along time."""

    @register_to_config
    def __init__(self, channels: tuple[int, ...] = (16, 32, 48), width: int = 128) -> None:
        """`channels`: of the 2-D stages, each halving time or pitch; `width`: of the 1-D ones."""
        super().__init__()
        self.codec = LinearMelCodec()
        strides = ((1, 2), (2, 2), (2, 2))
        layers, last = [], 1
        for count, stride in zip(channels, strides, strict=True):
            layers.append(
                nn.Sequential(
                    nn.Conv2d(last, count, 3, stride=stride, padding=1),
                    nn.GroupNorm(4, count),
                    nn.GELU(),
                )
            )
            last = count
        self.planes = nn.ModuleList(layers)
        self.flat = nn.Conv1d(last * 8, width, 1)
        self.blocks = nn.ModuleList(_Residual1d(width, 5, dilation) for dilation in (1, 3, 6))
        self.heads = self._make_heads(width)

    def stages(self, latents: Tensor) -> list[Tensor]:
        """See `Scorer.stages`: three planes [B, C, time, pitch], then lines [B, 128, 64]."""
        return self.mel_stages(self.codec.decode(latents))

    def mel_stages(self, mels: Tensor) -> list[Tensor]:
        """The same from log-mels [B, 256, 64], for audio that has no latents."""
        features: list[Tensor] = []
        hidden = mels[:, None]
        for plane in self.planes:
            hidden = plane(hidden)
            features.append(hidden)
        hidden = self.flat(hidden.transpose(2, 3).flatten(1, 2))
        for block in self.blocks:
            hidden = block(hidden)
            features.append(hidden)
        return features
