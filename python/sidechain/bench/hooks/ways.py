# SPDX-License-Identifier: Apache-2.0
"""What is put around a call: plain hooks, nnsight, and the rows that a table gets of them."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from ..cases import Row
from ..timing import Call, Turns

NNSIGHT = "0.8.1"
Way = Callable[[], contextlib.AbstractContextManager[Call]]


@contextlib.contextmanager
def hooked(
    modules: Iterable[Any], function: Callable[[int, Tensor], Tensor | None]
) -> Iterator[None]:
    """Attach a plain forward hook to every module; `function` gets its number and its output."""

    def hook(number: int) -> Callable[..., Tensor | None]:
        return lambda module, args, out: function(number, out)

    handles = [m.register_forward_hook(hook(number)) for number, m in enumerate(modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def nnsight_absent() -> str:
    """Why nnsight is not measured; "" where it is."""
    if importlib.util.find_spec("nnsight") is None:
        return f"nnsight is not installed here (make peers brings {NNSIGHT})"
    found = importlib.metadata.version("nnsight")
    return "" if found == NNSIGHT else f"expected nnsight {NNSIGHT}, got {found}"


def load_nnsight() -> Any:
    """The package, without the attribute that it adds to every object of the process.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    # That attribute breaks packages which list their attributes (torchsde, which diffusers loads).
    importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde")
    nnsight = importlib.import_module("nnsight")
    nnsight.CONFIG.APP.PYMOUNT = False
    return nnsight


def rows_of(
    case: str, taken: Mapping[str, Turns], kinds: Mapping[str, str], bare: str, absent: str = ""
) -> list[Row]:
    """Make the rows of a case.

    Args:
        case: its name.
        taken: way -> samples, the bare call among them.
        kinds: way -> kind, in the order of the rows.
        bare: name of the way with nothing attached.
        absent: why a way in `kinds` was not measured.

    Returns:
        Rows; fact `added_us`: microseconds more than the bare call, `added_share`: of the bare
        call.
    """
    rows = []
    for way, kind in kinds.items():
        row = Row(case, "f32", way, kind, 0, 0)
        rows.append(row)
        if way not in taken:
            row.failed = absent
            continue
        timing = taken[way].timing
        row.median_us, row.p20_us, row.p80_us = (
            round(1e6 * t, 2) for t in (timing.median, timing.p20, timing.p80)
        )
        row.method = timing.method
        added = taken[way].added(taken[bare])
        row.facts = {
            "added_us": round(1e6 * added, 2),
            "added_share": round(added / taken[bare].timing.median, 5),
        }
    return rows
