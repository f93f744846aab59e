# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint on disk has to hold before a run trusts it."""

from __future__ import annotations

import json
import re
import zlib
from pathlib import Path
from typing import Any

import safetensors
import torch

FORMAT = "sidechain.sae.training.checkpoint"
VERSION = 1
MANIFEST = "manifest.json"
FOLDER = re.compile(r"step-(\d{9,})")
_FILE = re.compile(r"features-\d{5}-of-\d{5}\.safetensors")
#: Settings that say which tensors there are and how large; others may change in a run.
_SHAPING = ("d_in", "features", "architecture", "d_out", "transcoder", "tied_bias")
_CUT = ("w_enc", "w_dec", "b_enc", "last_fired", "dead")
_WHOLE = ("b_dec", "normaliser.mean", "normaliser.scale")


def complete(folder: Path) -> list[Path]:
    """Return the folders of checkpoints, the oldest first."""
    if not folder.is_dir():
        return []
    return sorted(
        (p for p in folder.iterdir() if p.is_dir() and FOLDER.fullmatch(p.name)), key=step
    )


def step(folder: Path) -> int:
    """Return the step in the name of a checkpoint's folder."""
    return int(folder.name.partition("-")[2])


def read_manifest(folder: Path, config: dict[str, Any] | None) -> dict[str, Any]:
    """Read and check the manifest of a checkpoint.

    Args:
        folder: of the checkpoint.
        config: of the dictionary that is trained, as JSON values; None = any.

    Raises:
        ValueError: it is not one, or that of another step or dictionary.
        OSError: it cannot be read.
    """
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"expected JSON in {MANIFEST}, got too many levels") from None
    if not isinstance(found, dict):
        raise ValueError(f"expected an object in {MANIFEST}, got {type(found).__name__}")
    kind = found.get("format"), found.get("version")
    if kind != (FORMAT, VERSION) or isinstance(kind[1], bool):
        raise ValueError(f"expected {FORMAT} version {VERSION}, got {kind[0]} version {kind[1]}")
    if _whole(found, "step") != step(folder):
        raise ValueError(f"expected step {step(folder)} in {MANIFEST}, got {found['step']}")
    features = _check_files(found.get("files"))
    if _whole(found, "dead_total") > features:
        raise ValueError(f"expected dead_total <= {features}, got {found['dead_total']}")
    for name in ("metrics_bytes", "skipped_rows"):
        if name in found:
            _whole(found, name)
    if config is not None and "config" in found:
        _check_config(found["config"], config)
    return found


def _whole(values: dict[str, Any], name: str) -> int:
    value = values.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"expected {name} as a whole number, got {_short(value)}")
    return value


def _check_files(entries: Any) -> int:
    """Check that files cut the features without a gap; return the number of features."""
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"expected a list of files in {MANIFEST}, got {_short(entries)}")
    stop = 0
    for entry in entries:
        if not isinstance(entry, dict):
            raise ValueError(f"expected an object for each file, got {_short(entry)}")
        name = entry.get("file")
        if not isinstance(name, str) or not _FILE.fullmatch(name):
            raise ValueError(f"expected files of the checkpoint's own, got {_short(name)}")
        for key in ("bytes", "crc32", "first", "stop"):
            _whole(entry, key)
        if entry["first"] != stop or entry["stop"] <= stop:
            raise ValueError(
                f"expected features from {stop} on in {name}, got {entry['first']} to "
                f"{entry['stop']}"
            )
        stop = entry["stop"]
    return stop


def _check_config(found: Any, wanted: dict[str, Any]) -> None:
    if not isinstance(found, dict):
        raise ValueError(f"expected an object in config, got {_short(found)}")
    for name in _SHAPING:
        if name in found and name in wanted and found[name] != wanted[name]:
            raise ValueError(
                f"expected {name}={wanted[name]!r} [this run], got {_short(found[name])}"
            )


def check_tensors(folder: Path, manifest: dict[str, Any]) -> None:
    """Check the bytes of a checkpoint's files, and that its tensors are there and finite.

    Raises:
        ValueError, safetensors.SafetensorError: they are not what a run wrote.
        OSError: a file cannot be read.
    """
    for number, entry in enumerate(manifest["files"]):
        path = folder / entry["file"]
        if path.stat().st_size != entry["bytes"] or checksum(path) != entry["crc32"]:
            raise ValueError(f"expected the bytes that were written, got others in {path.name}")
        with safetensors.safe_open(path, framework="pt") as file:
            names = file.keys()
            for name in (*_CUT, *(() if number else _WHOLE)):
                if name not in names:
                    raise ValueError(f"expected {name} in {path.name}, got none")
            for name in names:
                _check_tensor(name, file.get_tensor(name), entry)


def _check_tensor(name: str, tensor: torch.Tensor, entry: dict[str, Any]) -> None:
    size = entry["stop"] - entry["first"]
    if name in _CUT and (tensor.dim() < 1 or len(tensor) != size):
        raise ValueError(f"expected {size} features in {name}, got {list(tensor.shape)}")
    if name == "threshold" and tensor.dim() == 0:
        return  # NaN until it is trained
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"expected finite numbers in {name}, got NaN or infinity")


def checksum(path: Path) -> int:
    """Return the CRC-32 of a file."""
    total = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            total = zlib.crc32(block, total)
    return total


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
