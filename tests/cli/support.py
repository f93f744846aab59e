# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)
