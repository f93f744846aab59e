# SPDX-License-Identifier: Apache-2.0
"""What a pipeline made of some prompts: sounds or images, decoded once and only if asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._errors import InputError


class Samples:
    """B generated samples.

    Give one of `waves` with `rate`, `images`, or `latents`; latents may have a `decoder` to waves.

    Args:
        waves: [B, channels, n] float32, in -1 .. 1.
        rate: samples of a wave in a second.
        images: [B, 3, h, w] float32, in 0 .. 1.
        latents: [B, ...], as the denoiser left them.
        decoder: latents [B, ...] -> waves [B, channels, n].

    Raises:
        ValueError: another shape, or waves without a rate.
    """

    def __init__(
        self,
        *,
        waves: Tensor | None = None,
        rate: int | None = None,
        images: Tensor | None = None,
        latents: Tensor | None = None,
        decoder: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if sum(part is not None for part in (waves, images, latents)) != 1:
            raise ValueError("samples: expected exactly one of waves, images, latents")
        if images is not None and (images.dim() != 4 or images.shape[1] != 3):
            raise ValueError(
                f"samples: expected images of shape [B, 3, h, w], got {list(images.shape)}"
            )
        if (waves is not None or decoder is not None) and rate is None:
            raise ValueError("samples: expected a rate beside waves, got none")
        self.latents, self.rate = latents, rate
        self._waves = None if waves is None else _waves(waves)
        self._images = images
        self._decoder = decoder

    def __len__(self) -> int:
        """Return B."""
        part = next(p for p in (self.latents, self._waves, self._images) if p is not None)
        return len(part)

    @property
    def kind(self) -> str:
        """Return "audio" or "image"."""
        return "image" if self._images is not None else "audio"

    def first(self, count: int) -> Samples:
        """Return the first `count` samples."""
        return self.rows(range(count))

    def rows(self, numbers: Sequence[int]) -> Samples:
        """Return some samples, by number."""
        chosen = list(numbers)
        return Samples(
            waves=_rows(self._waves if self.latents is None else None, chosen),
            rate=self.rate,
            images=_rows(self._images, chosen),
            latents=_rows(self.latents, chosen),
            decoder=self._decoder,
        )

    def waves(self, who: str) -> Tensor:
        """Return waves [B, channels, n]; `who` asks, for the message.

        Raises:
            InputError: the samples are images, or latents that nobody decodes.
        """
        if self._waves is None:
            if self.latents is None or self._decoder is None:
                got = "images" if self._images is not None else "latents"
                raise InputError(f"{who}: expected samples of sound, got {got}")
            self._waves = _waves(self._decoder(self.latents))
        return self._waves

    def images(self, who: str) -> Tensor:
        """Return images [B, 3, h, w] in 0 .. 1; `who` asks, for the message.

        Raises:
            InputError: the samples are sounds.
        """
        if self._images is None:
            raise InputError(f"{who}: expected images, got samples of sound")
        return self._images

    def check_finite(self, prompts: Sequence[str]) -> Samples:
        """Return the samples after a check that the model did not put out NaN or infinity.

        Raises:
            InputError: it did; the message names the first such sample.
        """
        part: Any = next(p for p in (self.latents, self._waves, self._images) if p is not None)
        finite = torch.isfinite(part.flatten(1)).all(1)
        if not bool(finite.all()):
            bad = int((~finite).nonzero()[0, 0])
            raise InputError(
                f"model: expected finite samples, got NaN or infinity for {prompts[bad]!r} [sample "
                f"{bad} of {len(part)}; a half precision may be too narrow: --dtype float32]"
            )
        return self


def _waves(waves: Tensor) -> Tensor:
    waves = waves[:, None] if waves.dim() == 2 else waves
    if waves.dim() != 3:
        raise ValueError(
            f"samples: expected waves of shape [B, channels, n], got {list(waves.shape)}"
        )
    return waves


def _rows(part: Tensor | None, numbers: list[int]) -> Tensor | None:
    return None if part is None else part[numbers]
