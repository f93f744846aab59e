# SPDX-License-Identifier: Apache-2.0
"""Environment report: versions, native libraries, instruction sets, and what runs where.

A backend that cannot run says why, so that a report is enough to explain a slow run.
"""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

import torch

from . import _native, ops
from ._version import __version__

_PACKAGES = (
    "torch",
    "numpy",
    "diffusers",
    "transformers",
    "tokenizers",
    "safetensors",
    "peft",
    "triton",
    "librosa",
    "soundfile",
)
_VARIABLES = ("SIDECHAIN_NATIVE", "SIDECHAIN_ISA", "SIDECHAIN_CUDA")


def doctor_report() -> dict[str, Any]:
    """Collect facts about this installation; changes nothing and asks no network.

    Returns:
        versions {package: version or None}; machine {name: fact}; libraries {library: None when
        loaded, else the reason}; build {fact: value} of the native code, empty without it;
        isa {"available": [...], "used": name or None}; ops {op: {backend: None when it can run
        here, else the reason}}; environment {variable: value} of those that are set.
    """
    host = _native.host()
    return {
        "versions": {"sidechain": __version__} | {name: _version(name) for name in _PACKAGES},
        "machine": {
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.machine()}",
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "cuda": torch.version.cuda,
            "devices": [
                torch.cuda.get_device_name(i)
                for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
            ],
        },
        "libraries": {name: _native.absent(name) for name in _native.LIBRARIES},
        "build": dict(host.build_info()) if host else {},
        "isa": {
            "available": list(host.isas()) if host else [],
            "used": str(host.best_isa()) if host and _native.absent("_C") is None else None,
        },
        "ops": ops.backends(),
        "environment": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }


def format_doctor(report: dict[str, Any]) -> str:
    """Lay a report of `doctor_report` out as text."""
    lines: list[str] = []
    for title in ("versions", "machine", "libraries", "build", "environment"):
        facts = report[title]
        if facts:
            lines += ["", title]
            width = max(map(len, facts))
            missing = "loaded" if title == "libraries" else "-"
            for name, value in facts.items():
                lines.append(f"  {name:<{width}}  {_text(value, missing)}")
    isa = report["isa"]
    lines += ["", "instruction sets", f"  available  {_text(isa['available'], '-')}"]
    lines += [f"  used       {_text(isa['used'], 'none: the reference runs')}"]
    lines += ["", "ops"]
    width = max(map(len, report["ops"]))
    for op, reasons in report["ops"].items():
        for backend, reason in reasons.items():
            answer = "yes" if reason is None else "no: " + reason
            lines.append(f"  {op:<{width}}  {backend:<9}  {answer}")
    return "\n".join(lines[1:])


def _text(value: object, missing: str) -> str:
    if value is None or value == "" or value == []:
        return missing
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
