# SPDX-License-Identifier: Apache-2.0
"""CLIP: cosine of an image and a text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .samples import Samples
from .texts import TowerScorer, embedding

#: Images that the vision tower reads at once.
_BATCH = 32


class ClipScorer(TowerScorer):
    """A CLIP model of transformers as a scorer.

    s[b, j] = cos(v_b, t_j), with v and t the projected outputs of the vision and the text tower.
    Images are read in 8 bits, as they would be saved.

    Args:
        name: in tables.
        model: `CLIPModel`.
        processor: its `CLIPProcessor`.

    Source: Radford et al. 2021, arXiv:2103.00020.
    """

    def scores(self, samples: Samples, texts: Sequence[str]) -> Tensor:
        """Return cosines [B, texts]."""
        text = self._texts(texts)
        parts = [
            embedding(self._model.get_image_features(pixel_values=pixels))
            for pixels in self._pixels(samples)
        ]
        return normalize(torch.cat(parts), dim=-1) @ text.T

    def features(self, samples: Samples) -> list[Tensor]:
        """Return the hidden states of the vision tower, [B, C, positions]."""
        parts = [
            self._model.vision_model(pixel_values=pixels, output_hidden_states=True).hidden_states
            for pixels in self._pixels(samples)
        ]
        return [torch.cat(stage).transpose(1, 2) for stage in zip(*parts, strict=True)]

    def _pixels(self, samples: Samples) -> Iterator[Tensor]:
        images = samples.images(f"scorer {self.name}").float().clamp(0, 1)
        pictures = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        for start in range(0, len(pictures), _BATCH):
            read = self._processor.image_processor(
                list(pictures[start : start + _BATCH]), return_tensors="pt"
            )
            yield read["pixel_values"].to(self._model.device, torch.float32)
