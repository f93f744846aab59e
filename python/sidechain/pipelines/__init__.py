# SPDX-License-Identifier: Apache-2.0
"""All that is known about diffusers pipelines: families, attention sites, steps and branches."""

from . import families as families
from .adapter import (
    Adapter,
    CallShape,
    call_argument,
    call_shape,
    call_timestep,
    config_hash,
    execution_device,
    register_adapter,
    source_tokens,
)
from .attention import Attention, describe_attention, read_attention, with_context
from .generation import Generation, Observer
from .words import token_grid, token_places
from .prompt_pairs import PromptPairs
from .sites import Site, SiteList, SitePattern, sites
from .tracker import GenerationTracker, observe, observers, release

__all__ = [
    "Adapter",
    "Attention",
    "CallShape",
    "Generation",
    "GenerationTracker",
    "Observer",
    "PromptPairs",
    "Site",
    "SiteList",
    "SitePattern",
    "call_argument",
    "call_shape",
    "call_timestep",
    "config_hash",
    "describe_attention",
    "execution_device",
    "observe",
    "observers",
    "read_attention",
    "register_adapter",
    "release",
    "sites",
    "source_tokens",
    "token_grid",
    "token_places",
    "with_context",
]
