# SPDX-License-Identifier: Apache-2.0
"""`sidechain doctor`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .._options import Settings, flag
from .builder import Command


@dataclass(frozen=True, kw_only=True)
class DoctorSettings(Settings):
    """Options of `sidechain doctor`."""

    json: bool = flag("for programs")


def run(settings: DoctorSettings, given: Mapping[str, Any]) -> int:
    """Print the report."""
    from ..doctor import doctor_report, format_doctor

    report = doctor_report()
    print(json.dumps(report, indent=2, default=str) if settings.json else format_doctor(report))
    return 0


COMMAND = Command(DoctorSettings, run, "Report versions, libraries and what runs where.")
