# SPDX-License-Identifier: Apache-2.0
"""Helpers for tests and benches, ours and those in the CI of users."""

from .tiny import generate, tiny_pipeline

__all__ = ["generate", "tiny_pipeline"]
