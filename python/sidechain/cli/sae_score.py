# SPDX-License-Identifier: Apache-2.0
"""`sidechain sae score`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..studies.features.config import DictionaryConfig
from .builder import Command


def run(config: DictionaryConfig, given: Mapping[str, Any]) -> int:
    """Score dictionaries and print the path of the report."""
    from ..studies.features import page
    from ..studies.features.run import run

    print(page.write(run(config), config.out / "report.html"))
    return 0


COMMAND = Command(
    DictionaryConfig,
    run,
    "Measure dictionaries on captions they were not trained on (unexplained variance, active and "
    "dead features), score their features for concepts from one generation of prompt pairs, and "
    "write tables and one HTML report with the clips in which the best features are most active. "
    "The path of the report is printed last.",
    replays=True,
)
