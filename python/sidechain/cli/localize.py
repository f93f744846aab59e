# SPDX-License-Identifier: Apache-2.0
"""`sidechain localize`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..studies.localization.config import LocalizationConfig
from .builder import Command


def run(config: LocalizationConfig, given: Mapping[str, Any]) -> int:
    """Localize and print the folder of the run."""
    if config.prompts is not None and "prompts" in given and "concepts" not in given:
        config = replace(config, concepts=tuple(config.prompts))
    config.check_prompts()

    from ..studies import localization
    from ..studies.localization import page
    from ..studies.processes import Processes

    localization.run(config)
    if Processes.of_environment().first:
        page.write(config.out)
        print(config.out)
    return 0


COMMAND = Command(
    LocalizationConfig,
    run,
    "Give one attention site at a time the prompt with the concept, all others the prompt without "
    "it, and measure what share of the full effect comes through (impact). Writes tables with "
    "bootstrap intervals and report.html, a page with heat maps, into the folder of the run.",
    replays=True,
)
