# SPDX-License-Identifier: Apache-2.0
"""How `edit` is told what becomes of the features of a dictionary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..pipelines import Site, SiteList
from . import options

#: What can be done with a feature; "zero" takes no number.
WORDS = ("scale", "set", "add", "zero")
Values = Mapping[int, Any]  # feature -> (word, number or one for each sample) or "zero"


@dataclass(frozen=True)
class Line:
    """f' = gain f + shift, one for each sample or for all, [B] or [1] float32."""

    word: str
    gain: Tensor
    shift: Tensor
    value: Any  # that it was read from

    @classmethod
    def parse(cls, feature: int, value: Any) -> Line:
        """Read ("scale", s): s f, ("set", v): v, ("add", a): f + a, "zero": 0."""
        word, *numbers = (value,) if isinstance(value, str) else _pair(feature, value)
        if word not in WORDS:
            raise ValueError(
                f"edit: expected one of {', '.join(WORDS)} for feature {feature}, got {word!r}"
            )
        if len(numbers) != (word != "zero"):
            wanted = "'zero'" if word == "zero" else f"({word!r}, number)"
            raise ValueError(f"edit: expected {wanted} for feature {feature}, got {value!r}")
        zero, one = torch.zeros(1), torch.ones(1)
        if word == "zero":
            return cls(word, zero, zero, value)
        number = options.per_sample("edit", f"number of feature {feature}", numbers[0], zero.dtype)
        if word == "scale":
            return cls(word, number, zero, value)
        return cls(word, zero if word == "set" else one, number, value)


def _pair(feature: int, value: Any) -> tuple[Any, ...]:
    if isinstance(value, tuple | list) and value and isinstance(value[0], str):
        return tuple(value)
    raise TypeError(
        f"edit: expected ({' | '.join(WORDS[:-1])}, number) or 'zero' for feature {feature}, got "
        f"{value!r}"
    )


def by_site(values: Any, sites: SiteList) -> dict[str, Values]:
    """Return the values of each site, by name, from {feature: ...} or {site: {feature: ...}}.

    Raises:
        TypeError, ValueError: another form, none at all, or a site that is not there.
    """
    if not isinstance(values, Mapping) or not values:
        got = "none" if isinstance(values, Mapping) else type(values).__name__
        raise TypeError(f"edit: expected {{feature: (word, number)}}, got {got}")
    named = [key for key in values if isinstance(key, str | Site)]
    if not named:
        return {site.name: values for site in sites}
    if len(named) < len(values):
        raise TypeError("edit: expected features or sites as keys, got both")
    found = {}
    for key, inner in values.items():
        if not isinstance(inner, Mapping) or not inner:
            raise TypeError(f"edit: expected {{feature: (word, number)}} for {key}, got {inner!r}")
        found[sites[key].name] = inner
    return found


def parse(values: Values, features: int, site: Site) -> dict[int, Line]:
    """Read the values of one site; `features` is the size of its dictionary."""
    found = {}
    for feature, value in values.items():
        if isinstance(feature, bool) or not isinstance(feature, int):
            raise TypeError(f"edit: expected feature numbers at {site}, got {feature!r}")
        if not 0 <= feature < features:
            raise ValueError(
                f"edit: expected features within [0, {features}) [dictionary of {site}], got "
                f"{feature}"
            )
        found[feature] = Line.parse(feature, value)
    return found
