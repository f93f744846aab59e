# SPDX-License-Identifier: Apache-2.0
"""`sidechain demo`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..studies.demo.config import DemoSettings
from .builder import Command


def run(settings: DemoSettings, given: Mapping[str, Any]) -> int:
    """Run the demo and print the path of its report."""
    from ..studies.demo import page
    from ..studies.demo.run import run
    from ..studies.demo.run import settings as sizes

    config = sizes(
        seed=settings.seed, short=settings.short, device=settings.device, dtype=settings.dtype
    )
    print(page.write(run(settings.out, config), settings.out / "report.html"))
    return 0


COMMAND = Command(
    DemoSettings,
    run,
    "Localize concepts in the small music model that ships with the package, steer three of them "
    "over a range of strengths and write one self-contained HTML report with playable audio. The "
    "path of the report is printed last.",
)
