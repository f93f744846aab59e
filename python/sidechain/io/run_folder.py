# SPDX-License-Identifier: Apache-2.0
"""Run folders: settings, finished parts and result files of a study that can be continued."""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from .._version import __version__
from .atomic import write_atomic


def write_text(path: Path, text: str) -> None:
    """Write a whole file or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text.encode("utf-8"))


def write_table(path: Path, table: pd.DataFrame) -> None:
    """Write a table as CSV, whole or not at all."""
    write_text(path, table.to_csv(index=False, float_format="%.6f"))


def write_json(path: Path, content: Any) -> None:
    """Write JSON, whole or not at all; what is undefined (NaN) becomes null."""
    text = json.dumps(_nan_to_none(content), indent=1, default=str, allow_nan=False)
    write_text(path, text + "\n")


def _nan_to_none(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {key: _nan_to_none(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_nan_to_none(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def digest(path: Path) -> str:
    """SHA-256 of a file, for configs: its path alone does not say what is in it."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def facts() -> dict[str, str]:
    """Versions that a manifest should name."""
    import diffusers

    return {
        "sidechain": __version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
        "threads": str(torch.get_num_threads()),
    }


class RunFolder:
    """A folder that remembers its config and the finished parts of a run."""

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        """Open `path`, or start it; a folder in which nothing was finished yet starts anew.

        Raises:
            ValueError: it holds a run with another config.
            PermissionError: it cannot be written.
        """
        self.path = path
        text = json.dumps(config, sort_keys=True, default=str)
        config_hash = hashlib.sha256(text.encode()).hexdigest()[:16]
        manifest = path / "manifest.json"
        if manifest.is_file() and not self._unused():
            known = json.loads(manifest.read_text())
            if known.get("config_hash") != config_hash:
                raise ValueError(
                    f"--out: expected a new folder or the same settings as in {manifest}, "
                    "got other settings"
                )
        else:
            write_json(
                manifest,
                {"config_hash": config_hash, "config": json.loads(text), "versions": facts()},
            )
        (path / "parts").mkdir(exist_ok=True)

    def _unused(self) -> bool:
        others = {entry.name for entry in self.path.iterdir()} - {"manifest.json", "parts"}
        return not others and not any(self.path.glob("parts/*.csv"))

    def part(self, name: str) -> pd.DataFrame | None:
        """A finished part, or None."""
        file = self.path / "parts" / f"{name}.csv"
        return pd.read_csv(file, keep_default_na=False) if file.is_file() else None

    def save_part(self, name: str, rows: pd.DataFrame) -> pd.DataFrame:
        """Save a part; reading it back gives the same numbers as a continued run would see."""
        write_table(self.path / "parts" / f"{name}.csv", rows)
        saved = self.part(name)
        assert saved is not None
        return saved
