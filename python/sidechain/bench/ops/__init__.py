# SPDX-License-Identifier: Apache-2.0
"""One module for each op, most of them through `_build`. It defines

`OP`: the op's name;
`cases(device, quick)`: the `Case`s that are timed, eager torch first as a person would write it;
with `quick` at tiny shapes and without compilers, to see that everything runs;
`small(device)`: cases that take no time, for a correctness run under a sanitizer.
"""

from __future__ import annotations

import importlib
from types import ModuleType

# The only list: a new op adds the stem of its module.
STEMS = (
    "tap",
    "attention_tap",
    "topk_encode",
    "sparse_decode",
    "sae_update",
    "encode_reduce",
    "sae_edit",
)


def modules(only: str = "") -> list[ModuleType]:
    """The modules of the ops whose name holds a text.

    Raises:
        ValueError: no op is named so.
    """
    every = [importlib.import_module(f"{__name__}.{stem}") for stem in STEMS]
    found = [m for m in every if only == m.OP] or [m for m in every if only in m.OP]
    if not found:
        names = ", ".join(module.OP for module in every)
        raise ValueError(f"bench: expected an op of {names}, got {only!r}")
    return found
