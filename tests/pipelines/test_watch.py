# SPDX-License-Identifier: Apache-2.0
"""Methods that are watched on one object."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from sidechain.pipelines.watch import Override


class Plain:
    def value(self) -> int:
        return 1


def adding(size: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return lambda plain: lambda: plain() + size


def test_one_around_what_wraps_another() -> None:
    """`functools.wraps` copies the attributes of what it wraps, those of an `Override` too."""
    owner = Plain()
    first = Override(owner, "value", adding(10))
    inner = owner.value

    @functools.wraps(inner)
    def users() -> int:
        return 100 + inner()

    owner.value = users  # type: ignore[method-assign]
    assert owner.value() == 111
    first.restore()
    assert owner.value() == 101
    second = Override(owner, "value", adding(20))
    assert owner.value() == 121
    second.restore()
    assert owner.value is users


def test_a_stale_one_that_somebody_put_back() -> None:
    owner = Plain()
    first = Override(owner, "value", adding(10))
    kept = owner.value
    first.restore()
    assert "value" not in vars(owner) and owner.value() == 1
    owner.value = kept  # type: ignore[method-assign]
    assert owner.value() == 1
    second = Override(owner, "value", adding(20))
    assert owner.value() == 21
    second.restore()
    assert owner.value() == 1
