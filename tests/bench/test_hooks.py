# SPDX-License-Identifier: Apache-2.0
"""Hooks beside taps: what is compared gives the same numbers, and every way has its row."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from sidechain.bench.hooks import rows, site, step

MACHINE: Any = SimpleNamespace(device="cpu")


def test_a_site_and_the_steps_of_a_tiny_model() -> None:
    found = {
        part[0].case: {row.provider: row for row in part}
        for name in ("zoo-R16", "step-tiny")
        for part in rows(MACHINE, only=name, seconds=0.0, quick=True)
    }
    assert set(found["zoo-R16-T65-C160"]) == {site.BARE, *site.KINDS}
    steps = found["step-tiny-R2"]
    assert set(steps) == {step.NOTHING, *step.KINDS}
    bare = steps[step.NOTHING].median_us
    for row in steps.values():
        if not row.failed:
            added = row.facts["added_us"]
            assert row.median_us > 0 and added == pytest.approx(
                row.facts["added_share"] * bare, abs=0.02 + 1e-3 * bare
            )


def test_taps_that_do_something_else_are_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = step.Steps.by_hooks

    @contextlib.contextmanager
    def other(steps: step.Steps) -> Iterator[Any]:
        steps.tables[0].neg_()  # hooks add the opposite at one site
        with plain(steps) as call:
            yield call
        steps.tables[0].neg_()

    monkeypatch.setattr(step.Steps, "by_hooks", other)
    with pytest.raises(AssertionError, match="not close"):
        list(rows(MACHINE, only="step-tiny", seconds=0.0, quick=True))


def test_an_unknown_case() -> None:
    with pytest.raises(ValueError, match="expected part of the name of a case"):
        list(rows(MACHINE, only="nothing of this name"))
