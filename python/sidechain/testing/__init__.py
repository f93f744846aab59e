# SPDX-License-Identifier: Apache-2.0
"""Helpers for tests and benches, ours and those in the CI of users."""

from .tiny import (
    PIPELINES,
    call_tiny,
    generate,
    latents_of,
    tiny_call,
    tiny_clap,
    tiny_clip,
    tiny_pipeline,
)

__all__ = [
    "PIPELINES",
    "call_tiny",
    "generate",
    "latents_of",
    "tiny_call",
    "tiny_clap",
    "tiny_clip",
    "tiny_pipeline",
]
