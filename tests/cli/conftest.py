# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest

#: Study -> module of its function `run` as the command calls it, and of its page.
STUDIES = {
    "localization": ("sidechain.studies.localization", "sidechain.studies.localization.page"),
    "vectors": ("sidechain.studies.vectors", None),
    "steering": ("sidechain.studies.steering", "sidechain.studies.steering.page"),
    "capture": ("sidechain.studies.capture", None),
    "features": ("sidechain.studies.features.run", "sidechain.studies.features.page"),
    "demo": ("sidechain.studies.demo.run", "sidechain.studies.demo.page"),
}


@pytest.fixture
def studies(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> SimpleNamespace:
    """Stand for all studies: `studies.<name>` is what the last command called it with, or None."""
    found = SimpleNamespace(**dict.fromkeys(STUDIES))

    def stub(name: str) -> Any:
        def run(*arguments: Any) -> Any:
            setattr(found, name, arguments[0] if len(arguments) == 1 else arguments)
            return {} if name == "capture" else "result"

        return run

    found.page = None  # where a page was written last

    def page_stub(*given: Any) -> Any:
        found.page = given[-1]
        return found.page

    for name, (module, page) in STUDIES.items():
        monkeypatch.setattr(importlib.import_module(module), "run", stub(name))
        if page is not None:
            monkeypatch.setattr(importlib.import_module(page), "write", page_stub)
    monkeypatch.chdir(tmp_path)
    return found
