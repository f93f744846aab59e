# SPDX-License-Identifier: Apache-2.0
"""Which accesses of global memory may be narrower than 16 bytes, and why.

A kernel that memory bounds reaches the memory's rate with few instructions only if each moves 16
bytes. Its loops (all its code where none moves any) may hold narrower accesses where a line here
says why; a line that no kernel needs any more has to go.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from build.kernel_rows import WIDE, Row

SCALAR = "<T, 1>"  # every instance that moves one element at a time
WHY_SCALAR = "rows that are not aligned or not a multiple of a pack: one element at a time"


class Narrow(NamedTuple):
    """Kernels that may move so many bytes at a time, with the reason."""

    kernels: tuple[str, ...]
    width: int
    why: str


CODES = "indices and values of codes: 4 bytes an entry, the same for the whole block"
LISTS = "two or three of the four numbers of a list's entry, where a list begins"
HALF_PACKS = "packs of four elements of two bytes"
SORT = "keys, codes and counts of the sort: neighbours in neighbouring threads"
RING = "a ring of half precision: its alignment is known at run time"
ALIGNMENT = "vectors, a float32 ring, sums: alignment known at run time"
ALLOWED = (
    Narrow(("decode_kernel", "decode_dvalues_kernel", "edit_kernel"), 4, CODES),
    Narrow(
        ("decode_kernel",),
        2,
        "a target of half precision whose rows are not aligned: known at run time",
    ),
    Narrow(
        ("decode_kernel",),
        8,
        "a target of half precision beside a float32 decoder: packs of four",
    ),
    Narrow(
        (
            "decode_table_kernel", "decode_tiles_kernel", "sae_square_kernel", "sae_tiles_kernel",
            "sae_update_kernel", "sum_cells_kernel", "sum_tiles_kernel",
        ),
        4,
        LISTS,
    ),
    Narrow(("decode_table_kernel", "edit_kernel"), 8, HALF_PACKS),
    Narrow(("decode_table_kernel",), 2, "a table of half precision that is not aligned"),
    Narrow(
        ("sae_update_kernel",),
        8,
        f"{HALF_PACKS} (x, state), int64 numbers of a feature",
    ),
    Narrow(("csc_count_kernel", "csc_scatter_kernel", "csc_start_kernel"), 4, SORT),
    Narrow(("csc_count_kernel", "csc_scatter_kernel"), 8, f"{SORT}; int64 labels and offsets"),
    Narrow(("tap_kernel", "tap_wide_kernel"), 2, RING),
    Narrow(("tap_kernel", "tap_wide_kernel"), 4, ALIGNMENT),
    Narrow(("tap_kernel",), 8, f"{RING}: packs of four beside float32"),
    Narrow(("tap_fold_kernel",), 1, "masks: one byte a token"),
    Narrow(("sae_fold_kernel",), 4, "a thread owns a channel"),
    Narrow(("sae_fold_square_kernel",), 8, "sums in float64, one for each block"),
    Narrow(("adam_step_kernel",), 4, "one thread, the numbers of a step"),
    Narrow(("adam_step_kernel",), 8, "one thread, the numbers of a step"),
)  # fmt: skip
# Instances that move no rows of elements: what their template arguments say is no width of packs.
SORTS = ("csc_count_kernel", "csc_scatter_kernel")
# The last template argument says whether rows are aligned.
ALIGNED_LAST = ("sae_square_kernel", "sae_tiles_kernel", "sae_update_kernel")


def base(kernel: str) -> str:
    """The name without template arguments."""
    return kernel.partition("<")[0]


def scalar(kernel: str) -> bool:
    """Whether it is an instance for packs of one element."""
    if base(kernel) in ALIGNED_LAST:
        return kernel.endswith("false>")
    numbers = re.findall(r"(?<![\w])\d+(?=[,>])", kernel)
    return bool(numbers) and numbers[0] == "1"


def widths(row: Row) -> set[int]:
    """Widths of its narrow accesses."""
    return {int(width) for width in row.narrow}


def refused(rows: Iterable[Row]) -> list[str]:
    """Narrow accesses that nothing allows, and wide instances that move most bytes by them."""
    allowed = {(kernel, e.width) for e in ALLOWED for kernel in e.kernels}
    found = []
    for row in rows:
        if scalar(row.kernel):
            continue
        for width, lines in row.narrow.items():
            if (base(row.kernel), int(width)) not in allowed:
                found.append(f"{row.kernel} ({row.arch}): {width} bytes at {', '.join(lines)}")
        rows_of_elements = "<" in row.kernel and base(row.kernel) not in SORTS
        if rows_of_elements and 2 * row.wide_bytes < row.bytes:
            found.append(
                f"{row.kernel} ({row.arch}): {row.wide_bytes} of {row.bytes} bytes of its main "
                f"loop move {WIDE} at a time ({row.loop})"
            )
    return found


def unneeded(rows: Iterable[Row]) -> list[str]:
    """What is allowed, kernel by kernel, and no row needs."""
    needed = {(base(r.kernel), w) for r in rows if not scalar(r.kernel) for w in widths(r)}
    return [
        f"{kernel}: {e.width} bytes ({e.why})"
        for e in ALLOWED
        for kernel in e.kernels
        if (kernel, e.width) not in needed
    ]


def table(rows: Iterable[Row]) -> list[str]:
    """One line for each kernel: narrowest and widest access, and why there are narrow ones."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(SCALAR if scalar(row.kernel) else base(row.kernel), []).append(row)
    lines = []
    for name in sorted(groups):
        narrow = min((r.narrowest for r in groups[name] if r.narrowest), default=0)
        wide = max(r.widest for r in groups[name])
        reason = WHY_SCALAR if name == SCALAR else _reasons(name)
        lines.append(f"{narrow:2} to {wide:2}  {name:22} {reason}")
    return lines


def _reasons(kernel: str) -> str:
    reasons: dict[str, list[int]] = {}
    for each in sorted(ALLOWED, key=lambda each: each.width):
        if kernel in each.kernels:
            reasons.setdefault(each.why, []).append(each.width)
    return "; ".join(f"{', '.join(map(str, w))}: {why}" for why, w in reasons.items()) or "-"
