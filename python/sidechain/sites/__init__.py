# SPDX-License-Identifier: Apache-2.0
"""Where: attention sites of a pipeline, and what is known about each call that reaches them."""

from .adapters import Adapter, CallShape, config_hash, execution_device, register_adapter
from .catalog import Site, SiteList, SitePattern, sites
from .context import Observer, Run, RunContext, observe, release

__all__ = [
    "Adapter",
    "CallShape",
    "Observer",
    "Run",
    "RunContext",
    "Site",
    "SiteList",
    "SitePattern",
    "config_hash",
    "execution_device",
    "observe",
    "register_adapter",
    "release",
    "sites",
]
