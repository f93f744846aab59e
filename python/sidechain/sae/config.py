# SPDX-License-Identifier: Apache-2.0
"""Architecture and sizes of a dictionary, and where it comes from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from typing import Any

from .architectures.registry import ARCHITECTURES, Architecture, taking

#: Active features of a token where none are asked for.
DEFAULT_K = 32


@dataclass(frozen=True)
class SaeConfig:
    """Shape and architecture of a dictionary.

    Attributes:
        d_in: width of the input.
        features: F, number of dictionary entries.
        architecture: one of `ARCHITECTURES`.
        k: active features per token (topk: that many positive ones at most; batch_topk and
            matryoshka: on average over a batch). None for the others.
        d_out: width of the output; None = d_in, an autoencoder.
        transcoder: output and input are different activations, even where the widths agree.
        prefixes: of matryoshka: ascending sizes of the nested dictionaries, the last one F.
        unit_norm: rows of `w_dec` have norm 1.
        tied_bias: `b_pre` is `b_dec`; otherwise `b_pre` is a constant of its own (a trained one
            would say the same as `b_enc`).
    """

    d_in: int
    features: int
    architecture: str = "batch_topk"
    k: int | None = None
    d_out: int | None = None
    transcoder: bool = False
    prefixes: tuple[int, ...] = ()
    unit_norm: bool = True
    tied_bias: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.architecture, str) or self.architecture not in ARCHITECTURES:
            raise ValueError(
                f"SaeConfig: expected architecture to be one of {', '.join(ARCHITECTURES)}, got "
                f"{self.architecture!r}"
            )
        for name in ("d_in", "features", "k", "d_out"):
            value = getattr(self, name)
            if name in ("k", "d_out") and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"SaeConfig: expected {name} as int, got {value!r}")
            if value < 1:
                raise ValueError(f"SaeConfig: expected {name} >= 1, got {value}")
        for name in ("transcoder", "unit_norm", "tied_bias"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise TypeError(f"SaeConfig: expected {name} as bool, got {value!r}")
        object.__setattr__(self, "prefixes", _sizes(self.prefixes))
        if self.d_out is not None and self.d_out != self.d_in and not self.transcoder:
            object.__setattr__(self, "transcoder", True)
        if self.transcoder:
            object.__setattr__(self, "tied_bias", False)
        self._check_k()
        self._check_prefixes()

    def _check_k(self) -> None:
        if self.kind.takes("k"):
            if self.k is None or self.k > self.features:
                raise ValueError(
                    f"SaeConfig: expected 1 <= k <= {self.features} [features] with "
                    f"architecture={self.architecture!r}, got {self.k}"
                )
        elif self.k is not None:
            raise ValueError(
                f"SaeConfig: expected no k with architecture={self.architecture!r} [a penalty "
                f"decides how many features fire], got {self.k}"
            )

    def _check_prefixes(self) -> None:
        sizes = self.prefixes
        if not self.kind.takes("prefixes"):
            if sizes:
                raise ValueError(
                    f"SaeConfig: expected no prefixes with architecture={self.architecture!r} "
                    f"[only with {taking('prefixes')}], got {sizes}"
                )
            return
        if not sizes:
            # Halves down to a sixteenth, as in the paper's fixed nesting.
            sizes = tuple(sorted({max(1, self.features >> shift) for shift in range(5)}))
            object.__setattr__(self, "prefixes", sizes)
        ascending = all(a < b for a, b in pairwise(sizes))
        if not ascending or sizes[0] < 1 or sizes[-1] != self.features:
            raise ValueError(
                f"SaeConfig: expected ascending prefixes that end at {self.features} [features], "
                f"got {sizes}"
            )

    @property
    def kind(self) -> Architecture:
        """Traits of the architecture."""
        return ARCHITECTURES[self.architecture]

    @property
    def width_out(self) -> int:
        """Width of the output."""
        return self.d_in if self.d_out is None else self.d_out

    def to_json(self) -> dict[str, Any]:
        """Return plain values for a file."""
        return {**asdict(self), "prefixes": list(self.prefixes)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> SaeConfig:
        """Read what `to_json` gave.

        Raises:
            TypeError, ValueError: unknown names or values that do not fit.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"SaeConfig: expected settings, got {type(values).__name__}")
        known = {f.name for f in fields(cls)}
        unknown = sorted(values.keys() - known)
        if unknown:
            raise ValueError(f"SaeConfig: expected settings of {sorted(known)}, got {unknown}")
        missing = sorted({"d_in", "features"} - values.keys())
        if missing:
            raise ValueError(f"SaeConfig: expected {missing}, got none")
        return cls(**values)


def _sizes(prefixes: Any) -> tuple[int, ...]:
    """Return prefixes as a tuple of whole numbers."""
    if not isinstance(prefixes, list | tuple) or not all(type(size) is int for size in prefixes):
        raise TypeError(f"SaeConfig: expected prefixes as whole numbers, got {prefixes!r}")
    return tuple(prefixes)


@dataclass(frozen=True)
class Provenance:
    """Where a dictionary comes from.

    Attributes:
        site: name of the site of the input.
        target_site: of the output; "" = the same.
        model: name or path of the pipeline.
        config_hash: of the denoiser; "" fits any.
        branches: guidance branches the activations are from.
        source: what it was trained on, or the format it was read from.
        tokens: number of training tokens.
        metrics: at the end of training (fvu, l0, dead, ...).
        extra: anything else, JSON values only.
    """

    site: str = ""
    target_site: str = ""
    model: str = ""
    config_hash: str = ""
    branches: tuple[str, ...] = ()
    source: str = ""
    tokens: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return plain values for a file."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Provenance:
        """Read what `to_json` gave; names this version does not know are left out.

        Raises:
            TypeError: a value of another type.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"Provenance: expected an object, got {type(values).__name__}")
        known = {f.name for f in fields(cls)}
        kept = {name: value for name, value in values.items() if name in known}
        # "passes": the name in files of version 0.1.0.
        branches = kept.get("branches", values.get("passes", ()))
        if not isinstance(branches, list | tuple):
            raise TypeError(f"Provenance: expected branches as a list, got {branches!r}")
        made = cls(**{**kept, "branches": tuple(branches)})
        for name, wanted in _TYPES.items():
            found = getattr(made, name)
            if isinstance(found, bool) or not isinstance(found, wanted):
                raise TypeError(f"Provenance: expected {name} as {wanted.__name__}, got {found!r}")
        if not all(isinstance(branch, str) for branch in made.branches):
            raise TypeError(f"Provenance: expected branches as strings, got {branches!r}")
        return made


#: Types of the fields of `Provenance` in a file.
_TYPES: dict[str, type] = {
    **dict.fromkeys(("site", "target_site", "model", "config_hash", "source"), str),
    "tokens": int,
    **dict.fromkeys(("metrics", "extra"), Mapping),
}
