# SPDX-License-Identifier: Apache-2.0
"""Packages that import what they export on first use (PEP 562)."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any


class _Package(ModuleType):
    """A package whose exports may have the name of a module of it, such as `run` in `run.py`.

    The import system binds a module to its package once it is loaded. Here the export wins; the
    module is reached by `from package.module import name`.
    """

    _exports: Mapping[str, str]
    _modules: frozenset[str]

    def __getattr__(self, name: str) -> Any:
        if name in self._modules:
            return importlib.import_module(f".{name}", self.__name__)
        if name not in self._exports:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(self._exports[name], self.__name__), name)
        super().__setattr__(name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in self._exports and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*self.__dict__, *self._exports, *self._modules})


def lazy(package: str, exports: Mapping[str, str], modules: Iterable[str] = ()) -> None:
    """Let a package import names when they are first asked for.

    Args:
        package: its `__name__`.
        exports: name -> module of the package that holds it, ".run".
        modules: modules of the package that are attributes of it without an import.
    """
    module = sys.modules[package]
    module.__dict__.update(_exports=dict(exports), _modules=frozenset(modules))
    module.__class__ = _Package
