# SPDX-License-Identifier: Apache-2.0
"""Helpers of the tap tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from torch import Tensor

import sidechain
from sidechain import Where
from sidechain.testing import generate

PROMPTS = ["piano song", "drums loop"]


def placed(options: dict[str, Any], sites: str | None = None) -> dict[str, Any]:
    """Gather the options that say where a tap acts into `where`."""
    names = {field.name for field in fields(Where)}
    place = {"sites": sites} | {name: v for name, v in options.items() if name in names}
    return {"where": Where(**place)} | {n: v for n, v in options.items() if n not in names}


def by_hook(
    pipe: Any, edit: Callable[[Tensor, int], Tensor], site: str = "cross:1", **call: Any
) -> Tensor:
    """Generate with a plain forward hook: edit(output [R, T, C], step)."""
    step = iter(range(1000))
    module = sidechain.sites(pipe)[site].module
    handle = module.register_forward_hook(lambda m, a, out: edit(out.clone(), next(step)))
    try:
        return generate(pipe, PROMPTS, **call)
    finally:
        handle.remove()
