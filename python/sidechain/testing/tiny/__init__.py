# SPDX-License-Identifier: Apache-2.0
"""Tiny random pipelines: real diffusers classes, random weights, no download."""

from .build import PIPELINES, tiny_pipeline
from .calls import PROMPTS, call_tiny, generate, latents_of, tiny_call
from .schedulers import SCHEDULERS
from .scorers import tiny_clap, tiny_clip

__all__ = [
    "PIPELINES",
    "PROMPTS",
    "SCHEDULERS",
    "call_tiny",
    "generate",
    "latents_of",
    "tiny_call",
    "tiny_clap",
    "tiny_clip",
    "tiny_pipeline",
]
