# SPDX-License-Identifier: Apache-2.0
"""What CLAP and CLIP share: two towers, of which one reads texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn.functional import normalize

from .._errors import InputError


class TowerScorer:
    """A scorer with two towers: cosine of a sample and a text.

    Args:
        name: in tables.
        model: of transformers.
        processor: its processor.
    """

    unit = "cosine"
    mapped = True
    classes: Sequence[str] | None = None

    def __init__(self, name: str, model: Any, processor: Any) -> None:
        self.name, self._model, self._processor = name, model, processor

    def _texts(self, texts: Sequence[str]) -> Tensor:
        return embed_texts(self.name, self._model, self._processor.tokenizer, texts)


def embed_texts(name: str, model: Any, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Return unit vectors [texts, D] of texts.

    Raises:
        InputError: a text longer than the tower reads: its end would not count.
    """
    read = tokenizer(list(texts), padding=True, return_tensors="pt")
    longest = int(read["attention_mask"].sum(1).max())
    most = tokenizer.model_max_length
    if longest > most:
        place = int(read["attention_mask"].sum(1).argmax())
        raise InputError(
            f"scorer {name}: expected texts of at most {most} tokens [its text tower], got "
            f"{longest} in {texts[place]!r}"
        )
    inputs = {k: read[k].to(model.device) for k in ("input_ids", "attention_mask")}
    return normalize(embedding(model.get_text_features(**inputs)), dim=-1)


def embedding(found: Any) -> Tensor:
    """Return what a tower put out: a tensor, or an object that holds it, by version."""
    made: Tensor = found if isinstance(found, Tensor) else found.pooler_output
    return made
