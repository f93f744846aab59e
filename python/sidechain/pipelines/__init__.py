# SPDX-License-Identifier: Apache-2.0
"""All that is known about diffusers pipelines: families, attention sites, steps and branches."""

from . import families as families
from .adapter import Adapter, CallShape, config_hash, execution_device, register_adapter
from .prompt_pairs import PromptPairs
from .sites import Site, SiteList, SitePattern, sites
from .tracker import Generation, GenerationTracker, Observer, observe, observers, release

__all__ = [
    "Adapter",
    "CallShape",
    "Generation",
    "GenerationTracker",
    "Observer",
    "PromptPairs",
    "Site",
    "SiteList",
    "SitePattern",
    "config_hash",
    "execution_device",
    "observe",
    "observers",
    "register_adapter",
    "release",
    "sites",
]
