# SPDX-License-Identifier: Apache-2.0
"""Rows whose true dictionary is known: a trainer can be judged by what it finds again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

#: Rows that are drawn at a time.
CHUNK = 4096


@dataclass(frozen=True)
class Planted:
    """Rows x = sum_i v_i a_i + noise, over `active` atoms drawn without replacement for each row.

    The atoms a_i have norm 1, the values v_i are uniform in [1, 2), the noise is normal. The same
    settings give the same rows, chunk by chunk.

    Attributes:
        width: d of a row.
        atoms: number of atoms.
        active: atoms in a row.
        noise: standard deviation of an element.
        seed: of the atoms and of the rows.
    """

    width: int
    atoms: int
    active: int
    noise: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.active <= self.atoms:
            raise ValueError(
                f"Planted: expected active between 1 and {self.atoms} [atoms], got {self.active}"
            )

    def dictionary(self) -> Tensor:
        """Return the atoms [atoms, width], float32."""
        found = torch.randn(self.atoms, self.width, generator=self._generator(0))
        return found / found.norm(dim=1, keepdim=True)

    def chunk(self, number: int) -> Tensor:
        """Return chunk `number` >= 0 of the rows [CHUNK, width], float32."""
        g = self._generator(1 + number)
        chosen = torch.rand(CHUNK, self.atoms, generator=g).topk(self.active, 1).indices
        values = 1 + torch.rand(CHUNK, self.active, generator=g)
        weights = torch.zeros(CHUNK, self.atoms).scatter_(1, chosen, values)
        noise = self.noise * torch.randn(CHUNK, self.width, generator=g)
        return weights @ self.dictionary() + noise

    def rows(self, start: int = 0) -> Iterator[Tensor]:
        """Yield the chunks from number `start` on, without end."""
        while True:
            yield self.chunk(start)
            start += 1

    def found(self, decoder: Tensor, cosine: float) -> float:
        """Return the share of atoms with a row of a decoder [F, width] at least that close.

        Args:
            decoder: rows of any length; a row of zeros is close to nothing.
            cosine: least cosine. Signs count: an atom only ever adds.
        """
        rows = decoder.detach().double()
        rows = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)
        best = (self.dictionary().double() @ rows.T).amax(1)
        return float((best >= cosine).double().mean())

    def _generator(self, stream: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * 1_000_003 + stream)
