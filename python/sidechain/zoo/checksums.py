# SPDX-License-Identifier: Apache-2.0
"""Shipped weights, and the checksums that show whether their files are intact."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from ..io.atomic import write_text

WEIGHTS = Path(__file__).resolve().parent / "weights"
CHECKSUMS = "checksums.json"


def write_checksums(folder: Path) -> None:
    """Write `checksums.json` (SHA-256 of every other file below `folder`)."""
    sums = {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != CHECKSUMS
    }
    write_text(folder / CHECKSUMS, json.dumps(sums, indent=1) + "\n")


def verify(folder: Path) -> None:
    """Check a weight folder against its checksums.

    Raises:
        FileNotFoundError: the folder, its list or a listed file is missing.
        ValueError: a file differs from what was saved.
    """
    listing = folder / CHECKSUMS
    if not listing.is_file():
        raise FileNotFoundError(f"zoo: expected weights with {CHECKSUMS} in {folder}, got none")
    for name, expected in json.loads(listing.read_text()).items():
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(f"zoo: expected the file {path} [{CHECKSUMS}], got none")
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != expected:
            raise ValueError(
                f"zoo: expected {name} with SHA-256 {expected[:12]}..., got {found[:12]}...; "
                "the file is damaged, install the package again"
            )
