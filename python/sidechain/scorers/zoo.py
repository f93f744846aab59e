# SPDX-License-Identifier: Apache-2.0
"""The classifiers of the zoo's music model as scorers: they read latents, and know its concepts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._errors import InputError
from ..zoo.music.concepts import CONCEPTS, Concept
from .samples import Samples

Array = NDArray[np.float64]


class ZooScorer:
    """One of the two classifiers; a class is a concept of the zoo, its score a probability.

    Args:
        name: "latent" or "mel".
        network: of `sidechain.zoo.scorers`.
    """

    unit = "probability"
    mapped = True
    classes: Sequence[str] | None = tuple(CONCEPTS)

    def __init__(self, name: str, network: Any) -> None:
        self.name, self.network = name, network

    def scores(self, samples: Samples, texts: Sequence[str]) -> Tensor:
        """Return probabilities [B, concepts]."""
        found = self.network.probabilities(self._latents(samples))
        wanted = [CONCEPTS[name] for name in texts]
        return torch.stack([found[one.attribute][:, one.class_index] for one in wanted], dim=1)

    def features(self, samples: Samples) -> list[Tensor]:
        """Return the stages of the network, [B, C, ...]."""
        stages: list[Tensor] = self.network.stages(self._latents(samples))
        return stages

    def kept(self, samples: Samples, origin: Sequence[int], but: Concept) -> dict[str, Array]:
        """Tell by attribute, but that of a concept, whether its most probable class is unchanged.

        Returns:
            1 or 0 for each sample [B], against sample origin[i] of the same batch.
        """
        made = {}
        for attribute, values in readings({self.name: self.network}, samples.latents)[
            self.name
        ].items():
            if attribute != but.attribute:
                classes = values.argmax(axis=1)
                made[attribute] = (classes == classes[list(origin)]).astype(float)
        return made

    def _latents(self, samples: Samples) -> Tensor:
        if samples.latents is None:
            raise InputError(
                "scorer zoo: expected latents of the zoo's music model [its classifiers read no "
                "other model], got decoded samples: --scorer clap:... or clip:..."
            )
        return samples.latents.float()


def readings(scorers: Mapping[str, Any], latents: Any) -> dict[str, dict[str, Array]]:
    """Compute probabilities [B, classes] by classifier and attribute."""
    return {
        name: {
            attribute: values.double().cpu().numpy()
            for attribute, values in scorer.probabilities(latents.float()).items()
        }
        for name, scorer in scorers.items()
    }
