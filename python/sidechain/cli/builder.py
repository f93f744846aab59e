# SPDX-License-Identifier: Apache-2.0
"""Build the options of a command from the fields of its settings, and its settings from them.

On argparse, not on tyro or jsonargparse: jsonargparse knows neither `--seeds 0 1 2` nor
`--batch-rows` and reports over several lines; tyro prints boxes, and one line only through a hook
that it calls private and unstable. Their imports alone took 0.2 to 0.3 s of half a second.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from .._errors import InputError
from .._options import Option, Settings, defaults, options, present

BAD_INPUT = 2
#: "--strengths -4,0,4" would read as an unknown option to argparse.
_NEGATIVE = re.compile(r"-(\d|\.\d|inf|nan)", re.IGNORECASE)


@dataclass(frozen=True)
class Command:
    """A command.

    Attributes:
        settings: dataclass of its options.
        run: (settings, words given by option) -> exit code.
        about: the text of its help.
        replays: whether it has `--config`.
    """

    settings: type[Settings]
    run: Callable[[Any, Mapping[str, Any]], int]
    about: str
    replays: bool = False


class Parser(argparse.ArgumentParser):
    """A parser with errors in one line and without abbreviations."""

    def __init__(self, *args: Any, **details: Any) -> None:
        super().__init__(*args, **{**details, "allow_abbrev": False})

    def error(self, message: str) -> NoReturn:
        """Report bad usage like any bad input: one line, exit code 2."""
        print(f"sidechain: error: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(BAD_INPUT)


def join_negatives(arguments: Sequence[str]) -> list[str]:
    """Write "--name -4" as "--name=-4": a value may begin with a minus sign."""
    joined: list[str] = []
    for argument in arguments:
        open_ = bool(joined) and joined[-1].startswith("--") and "=" not in joined[-1]
        if open_ and joined[-1] != "--" and _NEGATIVE.match(argument):
            joined[-1] = f"{joined[-1]}={argument}"
        else:
            joined.append(argument)
    return joined


def add_options(parser: argparse.ArgumentParser, command: Command) -> None:
    """Add an option for each field of the settings; others are absent or None."""
    groups: dict[str, Any] = {"": parser}
    known = defaults(command.settings)
    for name, option in options(command.settings).items():
        if option.group not in groups:
            groups[option.group] = parser.add_argument_group(option.group)
        details: dict[str, Any] = {"default": argparse.SUPPRESS, "help": _help(option, known, name)}
        if option.choices:
            details["choices"] = option.choices
        if option.positional:
            details |= {"nargs": "?", "metavar": option.metavar, "default": None}
            groups[option.group].add_argument(name, **details)
            continue
        if option.metavar is None:
            details["action"] = argparse.BooleanOptionalAction
        else:
            details["metavar"] = "NAME" if option.metavar == "VALUE" else option.metavar
        if option.many == "append":
            details["action"] = "append"
        elif option.many:
            details["nargs"] = option.many
        groups[option.group].add_argument(flag_of(name, option), dest=name, **details)
    if command.replays:
        parser.add_argument(
            "--config",
            metavar="FILE|RUN_FOLDER",
            default=argparse.SUPPRESS,
            help="settings of a run, or of a JSON or YAML file; other options override them",
        )


def build(
    command: Command,
    given: Mapping[str, Any],
    replay: Callable[[Path], Mapping[str, Any]] | None = None,
    name: str = "",
) -> Any:
    """Make the settings of a command.

    Args:
        command: which.
        given: texts by field, as parsed; "config" may be among them.
        replay: reads the settings of `--config`.
        name: of the command, for messages.

    Raises:
        InputError, OSError: what cannot be used, by option.
    """
    found = options(command.settings)
    values: dict[str, Any] = {}
    if "config" in given and replay is not None:
        if not given["config"]:
            raise InputError("--config: expected a file or a run folder, got ''")
        for key, value in present(found, replay(Path(given["config"]))).items():
            if key not in found:
                raise InputError(
                    f"--config: expected settings of {', '.join(found)}, got {key!r} in "
                    f"{given['config']}"
                )
            values[key] = found[key].read(label(key, found[key]), value)
    for key, option in found.items():
        if key in given:
            if given[key] == "" and not option.empty:
                raise InputError(f"{label(key, option)}: expected a value, got ''")
            values[key] = option.read(label(key, option), given[key])
    missing = [key for key in found if key not in values and key not in defaults(command.settings)]
    if missing:
        raise InputError(f"{name}: expected {found[missing[0]].metavar}, got none")
    settings = command.settings(**values)
    for key, option in found.items():
        value = getattr(settings, key)
        if option.probe is not None and value is not None:
            option.probe(label(key, option), value)
    return settings


def flag_of(name: str, option: Option) -> str:
    """Return the flag of an option."""
    return option.flag or f"--{name.replace('_', '-')}"


def label(name: str, option: Option) -> str:
    """Return what messages call an option."""
    return (option.metavar or name) if option.positional else flag_of(name, option)


def _help(option: Option, known: Mapping[str, Any], name: str) -> str:
    text = option.help
    if option.choices and not all(choice in text for choice in option.choices):
        text = f"{text}: {', '.join(option.choices)}"
    default = known.get(name)
    if default is not None and default is not False and "default" not in text:
        shown = ",".join(map(_word, default)) if isinstance(default, tuple) else _word(default)
        text = f"{text} (default {shown})"
    return text.replace("%", "%%")


def _word(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) and value == int(value) else str(value)
