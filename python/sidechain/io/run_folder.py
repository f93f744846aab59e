# SPDX-License-Identifier: Apache-2.0
"""Run folders: settings, finished parts and result files of a study that can be continued."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._errors import InputError
from .._options import defaults, options, present
from .._version import __version__
from .atomic import remove_partial, write_text
from .lock import shared
from .same import difference, digest, fingerprint, plain

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "RunFolder",
    "digest",
    "facts",
    "nan_to_none",
    "read_settings",
    "read_table",
    "write_json",
    "write_settings",
    "write_table",
    "write_text",
]

FORMAT, VERSION = "sidechain-run", 2
MANIFEST, SETTINGS, LOCK = "manifest.json", "settings.json", "run.lock"
#: Where a run is kept and what computes it are no settings of what it computes.
_PLACE = frozenset({"out", "device"})


def write_table(path: Path, table: pd.DataFrame) -> None:
    """Write a table as CSV, atomically."""
    write_text(path, table.to_csv(index=False, float_format="%.6f"))


def read_table(path: Path) -> pd.DataFrame:
    """Read a table that a run wrote.

    Raises:
        InputError: it is damaged; the message names the file.
        OSError: it cannot be read.
    """
    import pandas as pd

    try:
        return pd.read_csv(path, keep_default_na=False)
    except (ValueError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path}: expected the table of a finished part, got {error}; delete the file to "
            "measure the part again"
        ) from None


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically; undefined values (NaN) become null."""
    text = json.dumps(nan_to_none(content), indent=1, default=str, allow_nan=False)
    write_text(path, text + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        InputError: it is not one; the message names the file.
        OSError: it cannot be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: expected JSON, got {error}") from None
    except RecursionError:
        raise InputError(f"{path}: expected JSON, got too many levels") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def nan_to_none(content: Any) -> Any:
    """Return JSON values with null for NaN and infinity, which strict JSON does not have."""
    if isinstance(content, Mapping):
        return {key: nan_to_none(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [nan_to_none(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def facts() -> dict[str, str]:
    """Return the versions that a manifest names."""
    import diffusers
    import torch

    return {
        "sidechain": __version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
        "threads": str(torch.get_num_threads()),
    }


def settings_of(config: Any) -> dict[str, Any]:
    """Return the settings of a dataclass as JSON has them, without where and on what it runs."""
    return {f.name: plain(getattr(config, f.name)) for f in fields(config) if f.name not in _PLACE}


def write_settings(folder: Path, command: str, config: Any) -> None:
    """Write the settings of a command beside the files of another format, to be replayed."""
    write_json(folder / SETTINGS, {"command": command, "config": settings_of(config)})


def read_settings(path: Path, command: str) -> dict[str, Any]:
    """Read settings of a command from a run folder, or from a JSON or YAML file.

    Raises:
        InputError: no settings there, or those of another command.
        OSError: it cannot be read.
    """
    if path.is_dir():
        found = [path / name for name in (SETTINGS, MANIFEST) if (path / name).is_file()]
        if not found:
            raise InputError(f"--config: expected a run folder with {MANIFEST}, got {path}")
        content = read_json(found[0])
        inside = content.get("config")
        if not isinstance(inside, dict):
            raise InputError(f"--config: expected settings in {found[0]}, got none")
        if "command" not in content and inside.get("vector"):
            raise InputError(
                f"--config: expected a path of the vector in {found[0]} [an older version kept its "
                "digest alone], got none: give --vector and the other options"
            )
    else:
        content = _read_yaml(path) if path.suffix in (".yaml", ".yml") else read_json(path)
        inside = content.get("config", content)
    if content.get("command", command) != command:
        raise InputError(
            f"--config: expected settings of {command!r} in {path}, got those of "
            f"{content['command']!r}"
        )
    return {name: value for name, value in inside.items() if name not in _PLACE or path.is_file()}


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path}: expected YAML, got {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected names and values, got {type(content).__name__}")
    return content


class RunFolder:
    """A folder that remembers its settings and the finished parts of a run.

    It belongs to the process that made it for as long as the object lives; half files that a dead
    process left are removed.

    Args:
        path: of the folder.
        command: whose run it is.
        config: its settings, a dataclass.
        inputs: digests of what it reads, by setting; they count, the paths do not.
        lock: False where another process of the same run has the folder.

    Raises:
        InputError: it holds a run with other settings, or its manifest is damaged.
        RuntimeError: another process works there.
        OSError: it cannot be written.
    """

    def __init__(
        self,
        path: Path,
        command: str,
        config: Any,
        inputs: Mapping[str, str] | None = None,
        *,
        lock: bool = True,
    ) -> None:
        self.path = path
        if lock:
            path.mkdir(parents=True, exist_ok=True)
            expected = "--out: expected a folder that no other process works in"
            self._lock = shared(path / LOCK, expected)
            for folder in (path, path / "parts", path / "parts" / "pieces"):
                remove_partial(folder, lambda name: True)
        settings, read = settings_of(config), dict(inputs or {})
        counted = {name: value for name, value in settings.items() if name not in read}
        own = fingerprint(format=VERSION, command=command, settings=counted, inputs=read)
        manifest = path / MANIFEST
        if manifest.is_file() and not self._unused():
            known = read_json(manifest)
            if known.get("fingerprint") != own:
                self._check_same(known, command, config, read)
        else:
            content = {"format": FORMAT, "version": VERSION, "command": command}
            content |= {"fingerprint": own, "config": settings, "inputs": read}
            write_json(manifest, {**content, "versions": facts()})
        (path / "parts").mkdir(exist_ok=True)

    def _check_same(
        self, known: dict[str, Any], command: str, config: Any, read: Mapping[str, str]
    ) -> None:
        """Refuse other settings; version 1 had no digests but that of the vector."""
        wanted, first = settings_of(config), "command" not in known
        theirs = known.get("config")
        if not isinstance(theirs, dict):
            raise InputError(f"{self.path / MANIFEST}: expected settings, got none")
        theirs = present(options(type(config)), theirs)
        theirs = {name: value for name, value in theirs.items() if name not in _PLACE}
        if first:
            if "vector" in read:
                wanted["vector"] = read["vector"]
        else:
            theirs = {**theirs, **known.get("inputs", {}), "command": known.get("command")}
            wanted = {**wanted, **read, "command": command}
        found = difference(theirs, wanted, _defaults(config, wanted))
        if found is not None:
            name, old, new = found
            raise InputError(
                f"--out: expected a new folder or the same settings as in "
                f"{self.path / MANIFEST}, got other settings [{name} is {_short(old)} there, "
                f"{_short(new)} here]"
            )

    def _unused(self) -> bool:
        others = {entry.name for entry in self.path.iterdir()} - {MANIFEST, LOCK, "parts"}
        return not others and not any(self.path.glob("parts/*.csv"))

    def part(self, name: str) -> pd.DataFrame | None:
        """Return a finished part, or None.

        Raises:
            InputError: its file is damaged; the message names it.
        """
        file = self.path / "parts" / f"{name}.csv"
        return read_table(file) if file.is_file() else None

    def save_part(self, name: str, rows: pd.DataFrame) -> pd.DataFrame:
        """Save a part; reading it back gives the same numbers as a continued run would see."""
        write_table(self.path / "parts" / f"{name}.csv", rows)
        saved = self.part(name)
        assert saved is not None
        return saved


def _defaults(config: Any, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults of the settings that older versions did not have."""
    return {name: value for name, value in defaults(type(config)).items() if name in wanted}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
