# SPDX-License-Identifier: Apache-2.0
"""`PromptPairs`: what a concept is read from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .generate import spread_seeds


@dataclass(frozen=True)
class PromptPairs:
    """Prompts with a concept and without it, pair by pair, and the noise of each pair.

    Attributes:
        positive: with the concept.
        negative: without it, one for each positive one.
        concept: its name, kept with what is made of the pairs.
        seeds: pair i uses seeds[i % len(seeds)]; a number s stands for s, s + 1, ...

    Raises:
        TypeError, ValueError: prompts that are not lists of texts or do not pair up, no seeds.
    """

    positive: Sequence[str]
    negative: Sequence[str]
    concept: str = ""
    seeds: int | Sequence[int] = 0

    def __post_init__(self) -> None:
        for name in ("positive", "negative"):
            prompts = getattr(self, name)
            if isinstance(prompts, str) or not all(isinstance(p, str) for p in prompts):
                raise TypeError(f"PromptPairs: expected {name} as a list of str, got {prompts!r}")
        if not len(self.positive) or len(self.positive) != len(self.negative):
            raise ValueError(
                "PromptPairs: expected as many negative as positive prompts and at least one, got "
                f"{len(self.positive)} positive and {len(self.negative)} negative"
            )
        spread_seeds("PromptPairs", self.seeds, len(self))

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.positive)

    @property
    def noise(self) -> list[int]:
        """Seed of each pair."""
        return spread_seeds("PromptPairs", self.seeds, len(self))

    def batches(self, size: int) -> Iterator[tuple[list[str], list[int]]]:
        """Yield the prompts and seeds of pipeline calls: positive ones first, then negative ones.

        Both prompts of a pair are in the same call and start from the same noise.

        Args:
            size: pairs in one call.

        Raises:
            ValueError: size below 1.
        """
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"PromptPairs: expected batch_size >= 1, got {size!r}")
        seeds = self.noise
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            yield [*self.positive[part], *self.negative[part]], seeds[part] * 2
