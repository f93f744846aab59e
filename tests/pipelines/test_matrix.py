# SPDX-License-Identifier: Apache-2.0
"""The printed matrix tells of each check what came out of it."""

from __future__ import annotations

from types import SimpleNamespace

from pipelines import matrix


def report(check: str, family: str) -> SimpleNamespace:
    node = f"tests/pipelines/test_families.py::TestEveryFamily::test_{check}[{family}]"
    return SimpleNamespace(nodeid=node)


def test_marks() -> None:
    stats = {
        "passed": [report("one", "sd"), report("two", "sd"), report("one", "wan")],
        "skipped": [report("two", "wan")],
        "error": [report("one", "wan")],  # passed, then failed while it was taken down
        "": [SimpleNamespace(nodeid="tests/test_doctor.py::test_other[sd]")],
    }
    assert matrix.results(stats) == {
        "one": {"sd": "+", "wan": "F"},
        "two": {"sd": "+", "wan": "."},
    }
    assert matrix.lines(stats)[-2:] == ["one  +  F", "two  +  ."]
    assert matrix.lines({}) == []
