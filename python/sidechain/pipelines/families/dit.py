# SPDX-License-Identifier: Apache-2.0
"""DiT: images of a class; guidance rows in the order cond, null."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..adapter import (
    Adapter,
    Keywords,
    call_argument,
    call_shape,
    call_timestep,
    register_adapter,
)
from .patches import patch_tokens

_NULL = 1000  # class that the pipeline gives the rows without a condition


def _samples(args: tuple[Any, ...], kwargs: Keywords) -> int:
    labels: Tensor = call_argument(args, kwargs, 2, "class_labels")
    half, rest = divmod(len(labels), 2)
    guided = half > 0 and not rest and bool((labels[half:] == _NULL).all())
    return half if guided else len(labels)


register_adapter(
    "DiTTransformer2DModel",
    Adapter(
        family="dit",
        components=("transformer",),
        branches={1: ("cond",), 2: ("cond", "uncond")},
        samples=_samples,
        shape=call_shape((0, "hidden_states")),
        tokens=patch_tokens,
        timestep=call_timestep(1),
    ),
)
