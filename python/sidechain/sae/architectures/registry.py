# SPDX-License-Identifier: Apache-2.0
"""What is known of each architecture without torch: its options, its threshold, its step."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .base import Implementation

#: Options of a given number of active features, and of a penalty in its place.
_SELECTING = frozenset({"k", "k_start", "aux_k"})
_PENALISED = frozenset({"sparsity"})
_EVERYWHERE = frozenset({"saelens", "dictionary_learning"})


@dataclass(frozen=True)
class Architecture:
    """Traits of an architecture.

    Attributes:
        source: where it was published.
        selects: "row" keeps the k largest features of every row, "batch" the N k largest of N rows
            while it trains; "" keeps every feature that passes its own limit.
        threshold: "batch" is one number that follows the smallest value a batch selects, "feature"
            a trained number for each feature; "" is none.
        options: of the settings of `SaeConfig` and `TrainConfig` that are refused, left out or
            listed by architecture, those that this one takes.
        parameters: trained tensors [F] beside b_enc and the threshold.
        fused: served by the training step without autograd; otherwise by autograd alone.
        formats: other libraries' formats that hold it, of `sidechain.sae.formats`.
    """

    source: str
    selects: str = ""
    threshold: str = ""
    options: frozenset[str] = frozenset()
    parameters: tuple[str, ...] = ()
    fused: bool = False
    formats: frozenset[str] = _EVERYWHERE

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the tensors that it has beside those of every dictionary."""
        return (*(("threshold",) if self.threshold else ()), *self.parameters)

    def takes(self, option: str) -> bool:
        """Return whether a setting belongs to it."""
        return option in self.options


ARCHITECTURES = {
    "topk": Architecture(
        "arXiv 2406.04093",
        selects="row",
        options=_SELECTING | {"multi_k"},
        fused=True,
        formats=_EVERYWHERE | {"sparsify", "tada"},
    ),
    "batch_topk": Architecture(
        "arXiv 2412.06410",
        selects="batch",
        threshold="batch",
        options=_SELECTING,
        fused=True,
    ),
    "matryoshka": Architecture(
        "arXiv 2503.17547",
        selects="batch",
        threshold="batch",
        options=_SELECTING | {"prefixes"},
        fused=True,
    ),
    "jumprelu": Architecture("arXiv 2407.14435", threshold="feature", options=_PENALISED),
    "relu": Architecture("Bricken et al. 2023, Towards Monosemanticity", options=_PENALISED),
    "gated": Architecture("arXiv 2404.16014", options=_PENALISED, parameters=("b_gate", "r_mag")),
}


def taking(option: str) -> str:
    """Return the names of the architectures that take a setting, with commas."""
    return ", ".join(name for name, found in ARCHITECTURES.items() if found.takes(option))


def held_by(format: str) -> str:
    """Return the names of the architectures that a format holds, with commas."""
    return ", ".join(name for name, found in ARCHITECTURES.items() if format in found.formats)


def own_parameters() -> tuple[str, ...]:
    """Return the names of all `parameters`, once each."""
    names = (name for found in ARCHITECTURES.values() for name in found.parameters)
    return tuple(dict.fromkeys(names))


@cache
def implementation(name: str) -> Implementation:
    """Import the file of an architecture and return how it encodes and learns."""
    made: Implementation = import_module(f"{__package__}.{name}").IMPLEMENTATION
    return made
