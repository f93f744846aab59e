# SPDX-License-Identifier: Apache-2.0
"""Tap, patch and steer the attention of diffusion models.

`sites` says where; `capture`, `patch`, `steer` and `edit` say what happens there;
`cache_context` makes it cheaper.
Everything is imported on first use: `import sidechain` alone imports neither torch nor NumPy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._lazy import lazy

if TYPE_CHECKING:
    from ._errors import InputError
    from .pipelines.probe import probe
    from .pipelines.sites import sites
    from .pipelines.words import token_places
    from .taps.base import attached, detach_all
    from .taps.cache_context import cache_context
    from .taps.capture import capture, contexts
    from .taps.edit import edit
    from .taps.options import Where
    from .taps.patch import patch
    from .taps.steer import steer
    from .vectors import SteeringVector

    def __getattr__(name: str) -> Any: ...  # rooms and __version__, for type checkers


_ROOMS = (
    "bench",
    "cli",
    "doctor",
    "examples",
    "io",
    "metrics",
    "ops",
    "pipelines",
    "reference",
    "report",
    "sae",
    "scorers",
    "store",
    "studies",
    "taps",
    "testing",
    "vectors",
    "zoo",
)
__all__ = [
    "InputError",
    "SteeringVector",
    "Where",
    "attached",
    "cache_context",
    "capture",
    "contexts",
    "detach_all",
    "edit",
    "patch",
    "probe",
    "sites",
    "steer",
    "token_places",
]

lazy(
    __name__,
    {
        **dict.fromkeys(
            (
                "Where",
                "attached",
                "cache_context",
                "capture",
                "contexts",
                "detach_all",
                "edit",
                "patch",
                "steer",
            ),
            ".taps",
        ),
        "probe": ".pipelines",
        "sites": ".pipelines",
        "token_places": ".pipelines",
        "SteeringVector": ".vectors",
        "InputError": "._errors",
        "__version__": "._version",
    },
    modules=_ROOMS,
)
