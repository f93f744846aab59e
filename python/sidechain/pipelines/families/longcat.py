# SPDX-License-Identifier: Apache-2.0
"""LongCat-AudioDiT: one denoiser call for each branch."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..adapter import (
    Adapter,
    CallShape,
    Keywords,
    call_argument,
    call_shape,
    call_timestep,
    register_adapter,
)
from ..attention import with_context
from ..sites import Site


def _tokens(site: Site, shape: CallShape) -> int:
    return shape.latent[0]


def _verify(
    args: tuple[Any, ...], kwargs: Keywords, samples: int, branches: tuple[str, ...]
) -> None:
    # Without a negative prompt the context of the second call is exactly zero.
    context: Tensor = call_argument(args, kwargs, 1, "encoder_hidden_states")
    if branches == ("cond",) and not bool(context.any()):
        raise RuntimeError(
            "sites: expected the cond branch in the first denoiser call of a step [table of "
            "longcat], got a zero context: the pipeline calls its branches in another order"
        )


register_adapter(
    "LongCatAudioDiTTransformer",
    Adapter(
        family="longcat",
        components=("transformer",),
        branches={},
        calls=("cond", "uncond"),
        verify=_verify,
        shape=call_shape((0, "hidden_states"), (1, "encoder_hidden_states")),
        tokens=_tokens,
        timestep=call_timestep(3, scale=1000.0),
        describe=with_context("cross_attn"),
    ),
)
