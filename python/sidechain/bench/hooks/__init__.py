# SPDX-License-Identifier: Apache-2.0
"""What taps add to a model, beside hand-written hooks and nnsight that do the same.

`site`: microseconds at one attention module. `step`: whole denoiser steps, eager. `compiled`: the
same steps through `torch.compile`. `models` builds what is called, `ways` what is put around it.
nnsight is measured where it is installed (`make bench-hooks` does so); elsewhere its rows say why
they are empty.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..cases import Row
from ..machine import Machine
from . import compiled, site, step

__all__ = ["rows"]


def rows(
    machine: Machine, *, only: str = "", seconds: float = 0.6, quick: bool = False
) -> Iterator[list[Row]]:
    """Time every case whose name contains `only`; one list of rows for each.

    Args:
        machine: where.
        only: part of the name of a case; "" = all.
        seconds: for each way at a site; a way through a whole step gets five times as long.
        quick: one site, and the steps of a tiny model.

    Raises:
        AssertionError: a tap, and a hook or nnsight beside it, give different numbers.
        ValueError: no case has this name.
    """
    parts = [(module, name) for module in (site, step, compiled) for name in module.names(quick)]
    chosen = [(module, name) for module, name in parts if only in name]
    if not chosen:
        known = ", ".join(name for _, name in parts)
        raise ValueError(f"bench: expected part of the name of a case [{known}], got {only!r}")
    for module, name in chosen:
        with torch.inference_mode():
            measured = module.measured(name, machine, seconds)
        yield measured
