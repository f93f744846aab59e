# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

from build import widths


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for line in widths.printed:
        terminalreporter.write_line(line)
