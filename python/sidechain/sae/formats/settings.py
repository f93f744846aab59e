# SPDX-License-Identifier: Apache-2.0
"""`Settings`: values of another library's config, each checked where it is read.

A config is written by others: a value may be missing, null, of another type or out of range. What
is not the expected type is refused; nothing is read as true or as a number because Python can.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..._errors import InputError

_SHOWN = 60


class Settings:
    """A JSON object and the place it is from, for messages.

    Args:
        values: the object.
        place: file, and the keys that lead to it.
    """

    def __init__(self, values: Mapping[str, Any], place: str) -> None:
        self._values, self.place = values, place

    @classmethod
    def read(cls, path: Path) -> Settings:
        """Read a file that holds one JSON object.

        Raises:
            FileNotFoundError: there is none.
            InputError: it holds something else.
        """
        if not path.is_file():
            raise FileNotFoundError(f"formats: expected a file, got nothing at {path}")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise InputError(f"formats: expected JSON in {path}, got {one_line(error)}") from None
        if not isinstance(content, dict):
            raise InputError(
                f"formats: expected a JSON object in {path}, got {type(content).__name__}"
            )
        return cls(content, str(path))

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def to_json(self) -> dict[str, Any]:
        """Return the whole object."""
        return dict(self._values)

    def changed(self, **values: Any) -> Settings:
        """Return the same object with other values."""
        return Settings({**self._values, **values}, self.place)

    def inner(self, name: str) -> Settings:
        """Return an object in it; an empty one where it is missing or null."""
        found = self._values.get(name)
        if found is not None and not isinstance(found, dict):
            raise self.refused(name, "an object")
        return Settings(found or {}, f"{self.place}, {name}")

    def word(self, name: str, default: str = "") -> str:
        """Return a string; null counts as missing."""
        found = self._values.get(name)
        if found is not None and not isinstance(found, str):
            raise self.refused(name, "a string")
        return default if found is None else found

    def flag(self, name: str, default: bool = False) -> bool:
        """Return true or false; null counts as missing."""
        found = self._values.get(name)
        if found is not None and not isinstance(found, bool):
            raise self.refused(name, "true or false")
        return default if found is None else found

    def whole(self, name: str, *, least: int = 1) -> int | None:
        """Return a whole number, None where it is missing or null."""
        found = self._values.get(name)
        if found is None:
            return None
        number = not isinstance(found, bool) and isinstance(found, int | float)
        # An infinity is no whole number, and neither is a NaN.
        if not number or found != found or found in (float("inf"), float("-inf")):
            raise self.refused(name, f"a whole number >= {least}")
        if found != int(found) or found < least:
            raise self.refused(name, f"a whole number >= {least}")
        return int(found)

    def needed(self, name: str, *, least: int = 1) -> int:
        """Return a whole number that has to be there."""
        found = self.whole(name, least=least)
        if found is None:
            raise InputError(f"formats: expected {name} in {self.place}, got none")
        return found

    def agrees(self, name: str, size: int, why: str) -> None:
        """Check that a size, if it is given, is that of the weights."""
        found = self.whole(name, least=0)
        if found not in (None, 0, size):
            raise InputError(
                f"formats: expected {name}={size} [{why}] in {self.place}, got {found}"
            )

    def refused(self, name: str, wanted: str) -> InputError:
        """Return the error of a value that is not what was expected."""
        shown = repr(self._values.get(name))
        shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
        return InputError(f"formats: expected {name} as {wanted} in {self.place}, got {shown}")


def one_line(error: BaseException, limit: int = 200) -> str:
    """Return the text of an error without line breaks."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else f"{text[:limit]}..."
