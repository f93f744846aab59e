# SPDX-License-Identifier: Apache-2.0
"""Tap, patch and steer the attention of diffusion models.

`sites` says where; `capture`, `patch` and `steer` say what happens there; `share` makes it cheaper.
Everything else is imported on first use, so that `import sidechain` needs nothing but torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .pipelines import sites
from .taps import capture, contexts, patch, share, steer

if TYPE_CHECKING:
    from .vectors import SteeringVector

__all__ = ["SteeringVector", "capture", "contexts", "patch", "share", "sites", "steer"]

_LAZY_MODULES = frozenset(
    {
        "bench",
        "cli",
        "doctor",
        "io",
        "metrics",
        "ops",
        "pipelines",
        "reference",
        "report",
        "sae",
        "store",
        "studies",
        "testing",
        "vectors",
        "zoo",
    }
)


def __getattr__(name: str) -> Any:
    if name in _LAZY_MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name == "SteeringVector":
        return importlib.import_module(".vectors", __name__).SteeringVector
    if name == "__version__":
        return importlib.import_module("._version", __name__).__version__
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_LAZY_MODULES, "__version__"})
