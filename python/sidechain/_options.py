# SPDX-License-Identifier: Apache-2.0
"""Options as fields of frozen dataclasses, with default, choices, limits and help in one place.

A study declares its settings with `whole`, `number`, `choice` and the like; the command line builds
its options from the fields. Imports nothing but the standard library.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from ._errors import InputError

Read = Callable[[str, Any], Any]
Probe = Callable[[str, Any], object]


@dataclass(frozen=True)
class Option:
    """Description of a field as an option.

    Attributes:
        help: one line; "(default ...)" is added where it says none.
        read: (name, text or value) -> value of the field; raises InputError with that name.
        probe: (name, value); checks files and folders before a command begins.
        checked: whether `read` also runs where the settings are made in Python.
        choices: words that are allowed.
        before: word in files of earlier versions -> the choice it is now.
        was: name of the field in files of earlier versions, if it had another.
        metavar: what stands for the value in the help; None = a flag without a value.
        group: title under which the help lists it.
        flag: "--name" if it is not that of the field.
        positional: no flag.
        many: "+" takes several words, "append" may be repeated.
        empty: whether "" is a value.
        replayed: whether `--config RUN_FOLDER` takes it from there.
    """

    help: str
    read: Read
    probe: Probe | None = None
    checked: bool = False
    choices: tuple[str, ...] = ()
    before: Mapping[str, str] = field(default_factory=dict)
    was: str = ""
    metavar: str | None = "VALUE"
    group: str = ""
    flag: str = ""
    positional: bool = False
    many: str = ""
    empty: bool = False
    replayed: bool = True


def option(default: Any, help: str, read: Read, **details: Any) -> Any:
    """Declare a field that is read by a function of its own; `...` = it has no default."""
    found = Option(help, read, **details)
    return field(default=MISSING if default is ... else default, metadata={"option": found})


def whole(
    default: Any, help: str, *, least: int = 0, most: int | None = None, **details: Any
) -> Any:
    """Declare a whole number; None stays None where it is the default."""

    def read(name: str, value: Any) -> int | None:
        return None if value is None and default is None else read_whole(name, value, least, most)

    return option(default, help, read, **{"metavar": "N", "checked": True, **details})


def number(default: Any, help: str, *, least: float = -math.inf, **details: Any) -> Any:
    """Declare a finite number; None stays None where it is the default."""

    def read(name: str, value: Any) -> float | None:
        return None if value is None and default is None else read_number(name, value, least)

    return option(default, help, read, **{"metavar": "X", "checked": True, **details})


def choice(default: Any, help: str, choices: Sequence[str], **details: Any) -> Any:
    """Declare one word of several."""
    before = details.get("before", {})

    def read(name: str, value: Any) -> str | None:
        value = now(before, value)
        if value not in choices and not (value is None and default is None):
            raise InputError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
        found: str | None = value
        return found

    return option(default, help, read, **{"checked": True, "choices": tuple(choices), **details})


def now(before: Mapping[str, str], value: Any) -> Any:
    """Return the present word for one of an earlier version; other values as they are."""
    return before.get(value, value) if isinstance(value, str) else value


def present(known: Mapping[str, Option], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings that any version wrote by the names and words of today."""
    names = {option.was: name for name, option in known.items() if option.was}
    found = {names.get(name, name): value for name, value in settings.items()}
    return {
        name: now(known[name].before, value) if name in known else value
        for name, value in found.items()
    }


def flag(help: str, **details: Any) -> Any:
    """Declare a switch, off unless it is given."""

    def read(name: str, value: Any) -> bool:
        if not isinstance(value, bool):
            raise InputError(f"{name}: expected true or false, got {value!r}")
        return value

    return option(False, help, read, **{"metavar": None, "checked": True, **details})


def text(default: Any, help: str, metavar: str, **details: Any) -> Any:
    """Declare a text; None stays None where it is the default."""

    def read(name: str, value: Any) -> str | None:
        if not isinstance(value, str) and not (value is None and default is None):
            raise InputError(f"{name}: expected a text, got {value!r}")
        return value

    return option(default, help, read, **{"metavar": metavar, **details})


def path(default: Any, help: str, metavar: str, probe: Probe | None, **details: Any) -> Any:
    """Declare a path; `probe` says what should be there."""

    def read(name: str, value: Any) -> Path | None:
        if value is None and default is None:
            return None
        if not isinstance(value, str | Path) or not str(value):
            raise InputError(f"{name}: expected a path, got {value!r}")
        return Path(value)

    return option(default, help, read, **{"metavar": metavar, "probe": probe, **details})


@dataclass(frozen=True)
class Settings:
    """Settings of a command or a study; numbers, flags and choices are checked when they are made.

    Raises:
        InputError: a value that is not allowed; the message names the field.
    """

    def __post_init__(self) -> None:
        for name, found in options(type(self)).items():
            if found.checked:
                object.__setattr__(self, name, found.read(name, getattr(self, name)))


def options(kind: type) -> dict[str, Option]:
    """Return the options of a class of settings by field, in order."""
    return {f.name: f.metadata["option"] for f in fields(kind) if "option" in f.metadata}


def defaults(kind: type) -> dict[str, Any]:
    """Return the default of every field that has one."""
    return {f.name: f.default for f in fields(kind) if f.default is not MISSING}


def read_whole(name: str, value: Any, least: int, most: int | None = None) -> int:
    """Read a whole number between `least` and `most`."""
    try:
        found = int(value) if isinstance(value, str) else value
    except ValueError:
        found = None
    if isinstance(found, bool) or not isinstance(found, int):
        raise InputError(f"{name}: expected a whole number, got {value!r}")
    if found < least:
        raise InputError(f"{name}: expected at least {least}, got {found}")
    if most is not None and found > most:
        raise InputError(f"{name}: expected at most {most}, got {found}")
    return found


def read_number(name: str, value: Any, least: float = -math.inf) -> float:
    """Read a finite number of at least `least`."""
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise InputError(f"{name}: expected a finite number, got {value!r}")
    if found < least:
        raise InputError(f"{name}: expected at least {least:g}, got {found:g}")
    return found
