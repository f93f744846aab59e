# SPDX-License-Identifier: Apache-2.0
"""`topk_encode` in every precision against a linear layer and `topk`, at the shapes of the race."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from ..cases import Row, run_case
from ..machine import Machine
from ..ops import topk_encode
from ..results import Key
from ..shape import Shape


def rows(
    machine: Machine,
    shapes: Iterable[Shape],
    *,
    seconds: float,
    kept: Mapping[Key, Row] | None = None,
) -> Iterator[list[Row]]:
    """Measure one shape after the other.

    Args:
        machine: where.
        shapes: which.
        seconds: for each candidate.
        kept: rows that are there already.

    Yields:
        The rows of a shape. Facts: `recall` of the exact sets in float64, `equal sets` (share of
        the rows), `in full` (rows whose certificate failed).
    """
    for case in topk_encode.of_shapes(shapes, machine.device):
        found = [row for row in (kept or {}).values() if row.case == case.name]
        if not found:
            found = run_case(case, machine, seconds=seconds)
        yield found
