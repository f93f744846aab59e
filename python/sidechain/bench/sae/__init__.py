# SPDX-License-Identifier: Apache-2.0
"""Training steps of sparse autoencoders, ours beside plain torch and other packages.

`common` holds what all share (shapes, data, start), `plain` torch alone, `peers` other packages,
`ours` our trainer; `race` times them on the same batches; `encode` is the first half of a step by
itself; `memory` measures what a step adds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from ..cases import Row
from ..machine import Machine

PARTS = ("steps", "encode", "memory")


def parts(
    machine: Machine, only: str, seconds: float
) -> Iterator[tuple[str, Callable[[Mapping[tuple[str, str], Row]], Iterable[list[Row]]]]]:
    """The runs of the section: name, and how to measure it beside the rows that are kept.

    Args:
        machine: where.
        only: the name of a part, or part of the name of a shape; "" = everything.
        seconds: for each candidate of a case; a step of training gets as many.

    Raises:
        ValueError: nothing has this name.
    """
    from . import encode, memory, race

    named = only in PARTS
    shapes = "" if named else only
    names = [shape.name for shape in race.SHAPES[machine.device]]
    some = any(shapes in name for name in names)
    if not some and only not in memory.SHAPE.name:
        every = ", ".join([*PARTS, *names, memory.SHAPE.name])
        raise ValueError(f"bench: expected a part or a shape of sae [{every}], got {only!r}")
    if some and only in ("steps", shapes):
        yield "steps", lambda kept: race.rows(machine, only=shapes, seconds=seconds, kept=kept)
    if some and only in ("encode", shapes):
        yield "encode", lambda kept: encode.rows(machine, only=shapes, seconds=seconds, kept=kept)
    if only in ("memory", "") or only in memory.SHAPE.name:
        yield "memory", lambda kept: memory.rows(machine.device, kept=kept)
