# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

from sidechain.bench.cases import Candidate, Case


class Sleeper:
    """A sampler with a given time, so that no test waits for a clock."""

    method, issue, capture = "clock", None, ""

    def __init__(self, *seconds: float) -> None:
        self.seconds, self.taken = seconds, 0

    def sample(self) -> float:
        self.taken += 1
        return self.seconds[(self.taken - 1) % len(self.seconds)]


def doubling(*, ours: Any = None, name: str = "double", extra: tuple[Candidate, ...] = ()) -> Case:
    """A case whose work is to double a list of numbers."""

    def plain(numbers: list[float]) -> list[float]:
        return [2 * n for n in numbers]

    def check(candidate: Candidate) -> dict[str, Any] | None:
        if candidate.call([1.0, 2.0]) != [2.0, 4.0]:
            raise AssertionError(f"{candidate.name}: expected twice the numbers")
        return {"recall": 1.0} if candidate.kind == "ours" else None

    return Case(
        name,
        "f32",
        lambda seed: [float(seed)] * 50,
        (Candidate("eager", plain, "plain"), *extra, Candidate("cpu", ours or plain, "ours")),
        check,
        moved=4096,
        flops=0,
    )
