# SPDX-License-Identifier: Apache-2.0
"""A Python function of one's own as a scorer: `module:function`."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from .._errors import InputError
from ..io.same import digest
from .samples import Samples


class FunctionScorer:
    """A function (samples, texts) -> scores [B, texts] as a scorer."""

    unit = "score"
    mapped = False
    classes: Sequence[str] | None = None

    def __init__(self, name: str, function: Callable[[Samples, Sequence[str]], Any]) -> None:
        self.name, self._function = name, function

    def scores(self, samples: Samples, texts: Sequence[str]) -> Tensor:
        """Return what the function says."""
        found: Tensor = self._function(samples, texts)
        return found

    def features(self, samples: Samples) -> list[Tensor]:
        """Refuse: a function has none.

        Raises:
            InputError: always.
        """
        raise InputError(f"scorer {self.name}: expected feature maps, got a function without any")


def load_function(entry: str) -> Callable[..., Any]:
    """Import `module:function`, the working folder included.

    Raises:
        InputError: no such module or function.
    """
    module, _, name = entry.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(
            f"--scorer: expected module:function, got {entry!r} ({' '.join(str(error).split())})"
        ) from None
    if not callable(found):
        raise InputError(f"--scorer: expected a function, got {entry!r}, {type(found).__name__}")
    function: Callable[..., Any] = found
    return function


def function_digest(entry: str) -> str:
    """Return the digest of the file that a function stands in, or of its name where it has none."""
    file = inspect.getsourcefile(inspect.unwrap(load_function(entry)))
    return digest(file) if file is not None and Path(file).is_file() else entry
