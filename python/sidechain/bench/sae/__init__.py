# SPDX-License-Identifier: Apache-2.0
"""Training steps of sparse autoencoders, ours beside plain torch and other packages.

`common` has shapes, data and start, `plain` torch alone, `peers` other packages,
`ours` our trainer; `race` times them on the same batches; `encode` is the first half of a step by
itself; `memory` measures what a step adds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from ..cases import Row
from ..machine import Machine
from ..results import Key

PARTS = ("steps", "encode", "memory")


def parts(
    machine: Machine, only: str, seconds: float, *, quick: bool = False
) -> Iterator[tuple[str, Callable[[Mapping[Key, Row]], Iterable[list[Row]]]]]:
    """List the parts of the section: name, and how to measure it given the rows already there.

    Args:
        machine: where.
        only: the name of a part, or part of the name of a shape; "" = everything.
        seconds: for each candidate of a case; a step of training gets as many.
        quick: tiny shapes, nothing compiled.

    Raises:
        ValueError: nothing has this name.
    """
    from . import encode, memory, race

    named = only in PARTS
    shapes = "" if named else only
    table = race.QUICK if quick else race.SHAPES[machine.device]
    held = race.QUICK[0] if quick else memory.SHAPE
    chosen = [shape for shape in table if shapes in shape.name]
    if not chosen and only not in held.name:
        every = ", ".join([*PARTS, *(shape.name for shape in table), held.name])
        raise ValueError(f"bench: expected a part or a shape of sae [{every}], got {only!r}")
    everybody = race.entries(machine.device, compiled=not quick)
    if chosen and only in ("steps", shapes):
        yield (
            "steps",
            lambda kept: race.rows(
                machine, shapes=chosen, seconds=seconds, kept=kept, everybody=everybody
            ),
        )
    if chosen and only in ("encode", shapes):
        yield "encode", lambda kept: encode.rows(machine, chosen, seconds=seconds, kept=kept)
    if only in ("memory", "") or only in held.name:
        names = memory.CANDIDATES[-1:] if quick else memory.CANDIDATES
        yield "memory", lambda kept: memory.rows(machine.device, held, kept=kept, names=names)
