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
from .attention import Attention, describe_attention, described, read_attention, with_context
from .generation import Generation, Observer
from .places import Place, block_places
from .probe import probe
from .probed import Probe
from .prompt_pairs import PromptPairs
from .sites import Site, SiteList, SitePattern, sites
from .tracker import GenerationTracker, observe, observers, release
from .words import token_grid, token_places

__all__ = [
    "Adapter",
    "Attention",
    "CallShape",
    "Generation",
    "GenerationTracker",
    "Observer",
    "Place",
    "Probe",
    "PromptPairs",
    "Site",
    "SiteList",
    "SitePattern",
    "block_places",
    "call_argument",
    "call_shape",
    "call_timestep",
    "config_hash",
    "describe_attention",
    "described",
    "execution_device",
    "observe",
    "observers",
    "probe",
    "read_attention",
    "register_adapter",
    "release",
    "sites",
    "source_tokens",
    "token_grid",
    "token_places",
    "with_context",
]
