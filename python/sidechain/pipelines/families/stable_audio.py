# SPDX-License-Identifier: Apache-2.0
"""Stable Audio Open, and the music model of the zoo, which has the same denoiser."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..adapter import Adapter, CallShape, call_argument, register_adapter


def _shape(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> CallShape:
    latents: Tensor = call_argument(args, kwargs, 0, "hidden_states")  # [R, channels, frames]
    context: Tensor = call_argument(args, kwargs, 2, "encoder_hidden_states")  # [R, S, C]
    prepended: Tensor = call_argument(args, kwargs, 3, "global_hidden_states")  # [R, 1, C]
    return CallShape(
        rows=latents.shape[0],
        tokens=latents.shape[2] + prepended.shape[1],
        context_tokens=context.shape[1],
        device=latents.device,
        dtype=latents.dtype,
    )


def _verify(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], samples: int, branches: tuple[str, ...]
) -> None:
    if len(branches) < 2:
        return
    context: Tensor = call_argument(args, kwargs, 2, "encoder_hidden_states")
    cond = branches.index("cond") * samples
    # Without a negative prompt the context of the uncond rows is exactly zero; the only value
    # ever read back, once per generation.
    if not bool(context[cond : cond + samples].any()) and bool(context.any()):
        raise RuntimeError(
            f"sites: expected rows in the order {list(branches)} [table of stable_audio], got a "
            "zero context in the cond rows: the pipeline stacks its branches differently"
        )


register_adapter(
    "StableAudioDiTModel",
    Adapter(
        family="stable_audio",
        components=("transformer",),
        branches={1: ("cond",), 2: ("uncond", "cond")},
        shape=_shape,
        verify=_verify,
    ),
)
