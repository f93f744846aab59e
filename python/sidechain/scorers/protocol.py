# SPDX-License-Identifier: Apache-2.0
"""What a scorer and a distance are; studies know no more of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from .._errors import InputError
from .samples import Samples


class Scorer(Protocol):
    """Anything that scores generated samples against texts or classes.

    Attributes:
        name: in tables and on pages.
        unit: what a score is: "probability", "cosine", or another word.
        classes: names it knows; None = it reads any text.
        mapped: whether it has feature maps.
    """

    name: str
    unit: str
    classes: Sequence[str] | None
    mapped: bool

    def scores(self, samples: Samples, texts: Sequence[str]) -> Tensor:
        """Return a score [B, texts] for every sample and text; larger = more of it."""
        ...

    def features(self, samples: Samples) -> list[Tensor]:
        """Return feature maps [B, C, ...] of its network, from fine to coarse."""
        ...


class Distance(Protocol):
    """Anything that tells how far samples are from others."""

    name: str

    def distance(self, samples: Samples, origin: Sequence[int]) -> Tensor:
        """Return [B]: how far sample i is from sample origin[i] of the same batch."""
        ...


def read_scores(scorer: Scorer, samples: Samples, texts: Sequence[str]) -> Tensor:
    """Ask a scorer and check its answer.

    Args:
        scorer: whom to ask.
        samples: B of them.
        texts: texts, or names of classes.

    Returns:
        Scores [B, texts], float64 on the CPU.

    Raises:
        InputError: a class the scorer does not know, another shape, or scores that are not finite.
    """
    unknown = [] if scorer.classes is None else [t for t in texts if t not in scorer.classes]
    if unknown:
        raise InputError(
            f"scorer {scorer.name}: expected one of {', '.join(scorer.classes or ())} [its "
            f"classes], got {unknown[0]!r}"
        )
    with torch.no_grad():
        found = torch.as_tensor(scorer.scores(samples, list(texts))).double().cpu()
    if list(found.shape) != [len(samples), len(texts)]:
        raise InputError(
            f"scorer {scorer.name}: expected scores of shape [{len(samples)}, {len(texts)}] "
            f"[samples, texts], got {list(found.shape)}"
        )
    if not bool(torch.isfinite(found).all()):
        row, column = (~torch.isfinite(found)).nonzero()[0].tolist()
        raise InputError(
            f"scorer {scorer.name}: expected finite scores, got {float(found[row, column])} for "
            f"sample {row} and {texts[column]!r}"
        )
    return found
