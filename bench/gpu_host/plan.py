# SPDX-License-Identifier: Apache-2.0
"""What each of the three calls does, in which order, and how long a unit may take."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from . import work
from .session import Session

LIMIT = 520.0  # seconds of a call, all units at their limits; the host ends a command after 600
Work = Callable[[Session, str, str | None, float], str]


@dataclass(frozen=True)
class Unit:
    """What is run and stored at once."""

    section: str
    op: str | None  # part of the section
    seconds: float  # most it may take
    work: Work

    @property
    def title(self) -> str:
        """Section and part."""
        return f"{self.section} {self.op or ''}".rstrip()


def _ops(section: str, seconds: dict[str, float], work: Work) -> list[Unit]:
    return [Unit(section, op, limit, work) for op, limit in seconds.items()]


# Limits: twice what reading and rehearsing lets one expect, since the first launch of everything
# is among it. Proofs come first: a figure of a wrong kernel is worth nothing.
CALLS: dict[int, list[Unit]] = {
    1: [
        Unit("machine", "call 1", 20, work.machine),
        Unit("warm", "attention_tap+topk_encode", 60, work.warm),
        *_ops(
            "correctness",
            {
                "tap_": 20, "attention_tap": 30, "topk_encode": 40, "sparse_decode_loss": 20,
                "sae_update_": 25, "code_sums_": 15, "sae_edit_": 15,
            },
            work.correctness,
        ),
        Unit("tests", None, 135, work.tests),
        Unit("sanitizer", "memcheck", 65, work.sanitizer),
        Unit("sanitizer", "racecheck", 65, work.sanitizer),
    ],
    2: [
        Unit("machine", "call 2", 20, work.machine),
        Unit("warm", "topk_encode", 40, work.warm),
        Unit("sae", "encode", 75, work.bench),
        Unit("sae", "steps", 165, work.bench),
        Unit("ops", "topk_encode", 90, work.bench),
        Unit("ops", "sae_update_", 55, work.bench),
        Unit("ops", "sparse_decode_loss", 40, work.bench),
        Unit("sae", "memory", 30, work.bench),
    ],
    3: [
        Unit("machine", "call 3", 20, work.machine),
        Unit("warm", "attention_tap", 30, work.warm),
        Unit("ops", "tap_", 90, work.bench),
        Unit("ops", "attention_tap", 90, work.bench),
        Unit("generation", None, 70, work.bench),
        Unit("ops", "code_sums_", 25, work.bench),
        Unit("ops", "sae_edit_", 45, work.bench),
        Unit("hooks", None, 50, work.bench),
        Unit("sharing", None, 95, work.bench),
    ],
}  # fmt: skip


def sections() -> list[str]:
    """Names of all sections."""
    return list(dict.fromkeys(unit.section for units in CALLS.values() for unit in units))


def chosen(words: Iterable[str]) -> list[Unit]:
    """The units of some calls ("1") and sections ("tests"); of all, where none is named.

    Raises:
        ValueError: a word is neither.
    """
    words = list(words)
    every = [unit for units in CALLS.values() for unit in units]
    unknown = [word for word in words if word not in (*map(str, CALLS), *sections())]
    if unknown:
        names = ", ".join([*map(str, CALLS), *sections()])
        raise ValueError(f"gpu.sh: expected calls and sections of {names}, got {unknown[0]!r}")
    wanted = [u for n, units in CALLS.items() for u in units if str(n) in words]
    wanted += [u for u in every if u.section in words and u not in wanted]
    return wanted or every


def text() -> str:
    """The plan as it is printed."""
    lines = []
    for number, units in CALLS.items():
        parts = ", ".join(f"{unit.title} {unit.seconds:.0f}" for unit in units)
        total = sum(unit.seconds for unit in units)
        lines.append(f"call {number}: {total:.0f} s at most, of {LIMIT:.0f}: {parts}")
    return "\n".join(lines)
