# SPDX-License-Identifier: Apache-2.0
"""`sidechain steer`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .._errors import InputError
from ..studies.config import MODEL
from ..studies.steering.config import SteeringConfig
from ..zoo.music.concepts import CONCEPTS
from .builder import Command


def run(config: SteeringConfig, given: Mapping[str, Any]) -> int:
    """Sweep and print the folder of the run."""
    if "vector" in given and "concept" not in given:
        config = replace(config, concept=None)  # of a run that is replayed
    elif "concept" in given and "vector" not in given:
        config = replace(config, vector=None)
    if (config.vector is None) == (config.concept is None):
        got = "neither" if config.vector is None else "both"
        raise InputError(f"steer: expected either --vector FILE or --concept NAME, got {got}")
    if config.concept is not None and config.model == MODEL and config.concept not in CONCEPTS:
        raise InputError(f"--concept: expected {' | '.join(CONCEPTS)}, got {config.concept!r}")
    if config.vector is not None and config.method != "caa":
        raise InputError(
            f"--method: expected no --vector [it says how it was made], got {config.method} and "
            f"{config.vector}"
        )

    from ..studies import steering
    from ..studies.processes import Processes
    from ..studies.steering import page

    steering.run(config)
    if Processes.of_environment().first:
        page.write(config.out)
        print(config.out)
    return 0


COMMAND = Command(
    SteeringConfig,
    run,
    "Generate the same prompts at many strengths of a vector, at the localized sites, at all "
    "sites, at all but the localized ones and along a random direction of equal norm; score "
    "effect, preservation, AUC and smoothness. Writes tables and report.html, a page with the "
    "curves (with --audio also the clips), into the folder of the run.",
    replays=True,
)
