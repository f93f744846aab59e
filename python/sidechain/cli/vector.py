# SPDX-License-Identifier: Apache-2.0
"""`sidechain vector`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from .._errors import InputError
from .._options import options
from ..studies.config import MODEL
from ..studies.vectors.config import VectorConfig
from ..zoo.music.concepts import CONCEPTS
from .builder import Command


def run(config: VectorConfig, given: Mapping[str, Any]) -> int:
    """Make a vector and print where it was saved."""
    concept = config.concept
    if concept is None:
        if config.prompts is None:
            raise InputError("vector: expected --concept NAME or --prompts FILE.csv, got neither")
        concept = Path(given.get("prompts", "own")).stem
    elif config.prompts is None and config.model == MODEL and concept not in CONCEPTS:
        raise InputError(f"--concept: expected {' | '.join(CONCEPTS)}, got {concept!r}")
    out = config.out or Path(f"runs/vectors/{concept}.safetensors")
    probe = options(VectorConfig)["out"].probe
    if probe is not None:
        probe("--out", out)

    from ..studies import vectors

    vectors.run(replace(config, concept=concept, out=out))
    print(out)
    return 0


COMMAND = Command(
    VectorConfig,
    run,
    "Average the attention outputs of prompts with and without a concept, per step, branch and "
    "site, and save their difference as one safetensors file.",
    replays=True,
)
