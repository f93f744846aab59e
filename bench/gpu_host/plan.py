# SPDX-License-Identifier: Apache-2.0
"""The plan of the three calls: their units in order, and how long each may take."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from . import work
from .session import Session

LIMIT = 520.0  # seconds of a call, all units at their limits; the host ends a command after 600
Work = Callable[[Session, str, str | None, float], str]


@dataclass(frozen=True)
class Unit:
    """Work that is run and stored as one."""

    section: str
    op: str | None  # part of the section
    seconds: float  # most it may take
    work: Work

    @property
    def title(self) -> str:
        """Section and part."""
        return f"{self.section} {self.op or ''}".rstrip()


def _parts(section: str, seconds: dict[str, float], work: Work) -> list[Unit]:
    return [Unit(section, part, limit, work) for part, limit in seconds.items()]


# Limits are twice what rehearsals let us expect, because they include first launches. Proofs come
# first: a figure of a wrong kernel is worth nothing.
CALLS: dict[int, list[Unit]] = {
    1: [
        Unit("machine", "call 1", 20, work.machine),
        Unit("warm", "attention_tap+topk_encode", 60, work.warm),
        *_parts(
            "correctness",
            {
                "tap_": 20, "attention_tap": 30, "topk_encode": 40, "sparse_decode_loss": 20,
                "sae_update_": 25, "code_sums_": 15, "sae_edit_": 15,
            },
            work.correctness,
        ),
        Unit("tests", None, 135, work.tests),
        *_parts("sanitizer", {"memcheck": 65, "racecheck": 65}, work.sanitizer),
    ],
    2: [
        Unit("machine", "call 2", 20, work.machine),
        Unit("warm", "topk_encode", 40, work.warm),
        *_parts("sae", {"encode": 75, "steps": 165}, work.bench),
        *_parts(
            "ops", {"topk_encode": 90, "sae_update_": 55, "sparse_decode_loss": 40}, work.bench
        ),
        Unit("sae", "memory", 30, work.bench),
    ],
    3: [
        Unit("machine", "call 3", 20, work.machine),
        Unit("warm", "attention_tap", 30, work.warm),
        *_parts("ops", {"tap_": 90, "attention_tap": 90}, work.bench),
        Unit("generation", None, 70, work.bench),
        *_parts("ops", {"code_sums_": 25, "sae_edit_": 45}, work.bench),
        Unit("hooks", None, 50, work.bench),
        Unit("sharing", None, 95, work.bench),
    ],
}  # fmt: skip


def units() -> list[Unit]:
    """The units of all calls, in order."""
    return [unit for call in CALLS.values() for unit in call]


def sections() -> list[str]:
    """Names of all sections."""
    return list(dict.fromkeys(unit.section for unit in units()))


def chosen(words: Iterable[str]) -> list[Unit]:
    """Select the units of some calls ("1") and sections ("tests"); all of them by default.

    Raises:
        ValueError: a word is neither.
    """
    words = list(words)
    names = [*map(str, CALLS), *sections()]
    unknown = [word for word in words if word not in names]
    if unknown:
        raise ValueError(
            f"gpu.sh: expected calls and sections of {', '.join(names)}, got {unknown[0]!r}"
        )
    wanted = [unit for number, call in CALLS.items() if str(number) in words for unit in call]
    wanted += [unit for unit in units() if unit.section in words and unit not in wanted]
    return wanted or units()


def text() -> str:
    """Format the plan for printing."""
    lines = []
    for number, call in CALLS.items():
        parts = ", ".join(f"{unit.title} {unit.seconds:.0f}" for unit in call)
        total = sum(unit.seconds for unit in call)
        lines.append(f"call {number}: {total:.0f} s at most, of {LIMIT:.0f}: {parts}")
    return "\n".join(lines)
