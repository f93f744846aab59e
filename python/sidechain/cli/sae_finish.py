# SPDX-License-Identifier: Apache-2.0
"""`sidechain sae finish`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._options import Settings, path
from .builder import Command


@dataclass(frozen=True, kw_only=True)
class SaeFinishSettings(Settings):
    """Options of `sidechain sae finish`."""

    run: Path = path(..., "folder of the run", "DIR", None, positional=True, replayed=False)


def run(settings: SaeFinishSettings, given: Mapping[str, Any]) -> int:
    """Write the dictionary and print its path."""
    from ..sae.training.finishing import RESULT, finish

    finish(settings.run)
    print(settings.run / RESULT)
    return 0


COMMAND = Command(
    SaeFinishSettings,
    run,
    "Make the dictionary of a run that has not ended, from its last checkpoint. `sidechain sae "
    "train` with --reason goes on from there later.",
)
