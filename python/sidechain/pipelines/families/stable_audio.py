# SPDX-License-Identifier: Apache-2.0
"""Stable Audio Open, and the music model of the zoo, which has the same denoiser."""

from __future__ import annotations

from dataclasses import replace
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
from ..attention import ADDED, described
from ..places import block_places
from ..sites import Site


def _tokens(site: Site, shape: CallShape) -> int:
    return shape.latent[1] + 1  # one global token of the durations in front


def _verify(
    args: tuple[Any, ...], kwargs: Keywords, samples: int, branches: tuple[str, ...]
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


STABLE_AUDIO = Adapter(
    family="stable_audio",
    components=("transformer",),
    branches={1: ("cond",), 2: ("uncond", "cond")},
    shape=call_shape((0, "hidden_states"), (2, "encoder_hidden_states")),
    tokens=_tokens,
    timestep=call_timestep(1),
    verify=_verify,
    describe=described("text and durations", ADDED),
    places=block_places("transformer_blocks", mlp="ff", goes=ADDED),
)
register_adapter("StableAudioDiTModel", STABLE_AUDIO)
# The zoo's pipeline divides its timesteps by their number in training.
register_adapter(
    "StableAudioDiTModel",
    replace(STABLE_AUDIO, timestep=call_timestep(1, scale=1000.0)),
    pipeline="MusicPipeline",
)
