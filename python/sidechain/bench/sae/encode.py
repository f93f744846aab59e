# SPDX-License-Identifier: Apache-2.0
"""`topk_encode` in every precision against a linear layer and `topk`, at the shapes of the race."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from sidechain.testing.cases import TopkEncodeCase

from ..cases import Row, run_case
from ..machine import Machine
from ..ops import topk_encode
from . import race


def rows(
    machine: Machine, *, only: str = "", seconds: float, kept: Mapping[race.Key, Row] | None = None
) -> Iterator[list[Row]]:
    """Measure one shape after the other.

    Args:
        machine: where.
        only: part of the name of a shape.
        seconds: for each candidate.
        kept: rows that are there already.

    Yields:
        The rows of a shape. Facts: `recall` of the exact sets in float64, `equal sets` (share of
        the rows), `in full` (rows whose certificate failed), `x bf16`: how many times faster than
        ours in bfloat16.
    """
    for shape in race.SHAPES[machine.device]:
        case = TopkEncodeCase(shape.tokens, shape.width, shape.features, shape.k)
        if only not in shape.name:
            continue
        found = [row for (name, _), row in (kept or {}).items() if name == case.name]
        if not found:
            timed = topk_encode.timed_case(case, machine.device, others=False)
            found = run_case(timed, machine, seconds=seconds)
            _compare(found)
        yield found


def _compare(rows: list[Row]) -> None:
    narrow = next((r.median_us for r in rows if r.provider.endswith(" bf16")), None)
    for row in rows:
        if narrow and row.median_us:
            row.facts["x bf16"] = round(narrow / row.median_us, 2)
