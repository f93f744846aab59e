# SPDX-License-Identifier: Apache-2.0
"""Values of options with a notation of their own: lists, ranges, slices, files, places to write.

A reader takes the text of the command line, or a value as JSON and Python have it, and raises
InputError (or OSError) where it cannot be used.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ._errors import InputError
from ._options import read_number, read_whole

#: Noise seeds are multiples of it that have to fit 63 bits, see `studies.common.noise_seed`.
SEED_MOST = 2**43 - 1


def strengths(name: str, value: Any) -> tuple[float, ...]:
    """Read "0,2,4" or "-8:8:9" (low, high, count); sorted, 0 added if it is not among them."""
    if not isinstance(value, str):
        return tuple(read_number(name, one) for one in _items(name, value))
    parts = value.split(":")
    if len(parts) == 3:
        low, high = read_number(name, parts[0]), read_number(name, parts[1])
        count = read_whole(f"{name} lo:hi:n, n", parts[2], 2)
        if not low < high:
            raise InputError(f"{name}: expected lo < hi in lo:hi:n, got {value!r}")
        found = [low + (high - low) * index / (count - 1) for index in range(count)]
    elif len(parts) == 1:
        found = [read_number(name, part) for part in value.split(",")]
    else:
        raise InputError(f"{name}: expected a,b,c or lo:hi:n, got {value!r}")
    if len(set(found)) != len(found):
        raise InputError(f"{name}: expected every strength once, got {value!r}")
    return tuple(sorted({0.0, *(one + 0.0 for one in found)}))


def window(name: str, value: Any) -> tuple[int | float, int | float] | None:
    """Read "A:B", two step numbers or two fractions of a generation; None = all."""
    if value is None:
        return None
    parts = value.split(":") if isinstance(value, str) else list(_items(name, value))
    if len(parts) != 2:
        raise InputError(f"{name}: expected A:B, got {value!r}")
    if all(str(part).lstrip("+-").isdigit() for part in parts):
        start, stop = (read_whole(name, part, 0) for part in parts)
        if start >= stop:
            raise InputError(f"{name}: expected A < B in A:B, got {value!r}")
        return start, stop
    first, last = (read_number(name, part) for part in parts)
    if not 0.0 <= first < last <= 1.0:
        raise InputError(f"{name}: expected fractions 0 <= A < B <= 1 in A:B, got {value!r}")
    return first, last


def span(name: str, value: Any) -> slice | None:
    """Read "A:B" or "A:B:STEP" with any part left out, as in Python; None = all."""
    if value is None or isinstance(value, slice):
        return value
    try:
        parts = [int(part) if part else None for part in str(value).split(":")]
    except ValueError:
        parts = []
    if len(parts) not in (2, 3):
        raise InputError(f"{name}: expected A:B or A:B:STEP, got {value!r}")
    found = slice(*parts)
    if found.step is not None and found.step < 1:
        raise InputError(f"{name}: expected STEP >= 1, got {value!r}")
    return found


def seeds(name: str, value: Any) -> tuple[int, ...]:
    """Read seeds given as "0 1 2" or "0,1,2"."""
    words = [value] if isinstance(value, str | int) else list(_items(name, value))
    parts = [
        part for word in words for part in (word.split(",") if isinstance(word, str) else [word])
    ]
    found = [read_whole(name, part, 0, SEED_MOST) for part in parts]
    if not found:
        raise InputError(f"{name}: expected at least one seed, got none")
    if len(set(found)) != len(found):
        raise InputError(f"{name}: expected every seed once, got {' '.join(map(str, found))}")
    return tuple(found)


def words(known: Iterable[str]) -> Callable[[str, Any], tuple[str, ...]]:
    """Return a reader of comma lists of known words."""
    allowed = list(known)

    def read(name: str, value: Any) -> tuple[str, ...]:
        if isinstance(value, str):
            value = [word.strip() for word in value.split(",")] if value else []
        found = list(_items(name, value))
        unknown = [word for word in found if word not in allowed]
        if unknown:
            raise InputError(f"{name}: expected {' | '.join(allowed)}, got {unknown[0]!r}")
        return tuple(dict.fromkeys(found))

    return read


def mebibytes(name: str, value: Any) -> int:
    """Read a text as MiB, a number as bytes."""
    return (
        read_whole(name, value, 1) << 20 if isinstance(value, str) else read_whole(name, value, 1)
    )


def model(name: str, value: Any) -> str:
    """Read "zoo:music", the folder of a saved pipeline, or an id of the hub."""
    if not isinstance(value, str) or not value:
        raise InputError(f"{name}: expected {_MODEL}, got {value!r}")
    return value


_MODEL = "zoo:music, the folder of a saved pipeline, or a hub id"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def model_there(name: str, value: str) -> None:
    """Check that a model is one of the zoo, an existing folder, or could be on the hub."""
    if value == "zoo:music" or Path(value).is_dir():
        return
    if value.startswith("zoo:") or not _HUB_ID.fullmatch(value) or value.startswith("."):
        raise InputError(f"{name}: expected {_MODEL}, got {value!r}")


def calls(name: str, value: Any) -> tuple[tuple[str, Any], ...]:
    """Read arguments of a pipeline call: "height=64" and the like, or pairs."""
    found: dict[str, Any] = {}
    for one in [value] if isinstance(value, str) else _items(name, value):
        if isinstance(one, str):
            key, equals, word = one.partition("=")
            if not equals or not key.isidentifier():
                raise InputError(f"{name}: expected KEY=VALUE, got {one!r}")
            found[key] = _word(word)
        else:
            key, found[str(key)] = one
    return tuple(found.items())


def _word(text: str) -> Any:
    """Read a value as JSON has it (numbers, true, false, lists), or else as a text."""
    try:
        return json.loads(
            {"none": "null", "true": "true", "false": "false"}.get(text.lower(), text)
        )
    except ValueError:
        return text


def scorers(name: str, value: Any) -> tuple[str, ...]:
    """Read "zoo", "clap:PATH", "clip:PATH" or "module:function", one or several."""
    found = [str(one) for one in ([value] if isinstance(value, str) else _items(name, value))]
    for one in found:
        kind, colon, rest = one.partition(":")
        if one != "zoo" and not (colon and kind and rest):
            raise InputError(f"{name}: expected {_SCORER}, got {one!r}")
        if kind == "zoo" and colon:
            raise InputError(f"{name}: expected {_SCORER}, got {one!r}")
    if len(set(found)) != len(found):
        raise InputError(f"{name}: expected every scorer once, got {', '.join(found)}")
    return tuple(found)


_SCORER = "zoo, clap:FOLDER|ID, clip:FOLDER|ID or module:function"


def distance(name: str, value: Any) -> str:
    """Read "scorer", "spectral", "lpips", "clap:PATH" or "clip:PATH"."""
    kind, colon, rest = str(value).partition(":")
    if value not in ("scorer", "spectral", "lpips") and not (
        kind in ("clap", "clip") and colon and rest
    ):
        raise InputError(
            f"{name}: expected scorer, spectral, lpips, clap:FOLDER|ID or clip:FOLDER|ID, got "
            f"{value!r}"
        )
    return str(value)


def rows(name: str, value: Any) -> int | str:
    """Read a number of rows, or "auto"."""
    return "auto" if value == "auto" else read_whole(name, value, 1)


def device(name: str, value: Any) -> str | None:
    """Read a device as torch names them; None = as the command chooses."""
    if value is not None and not re.fullmatch(r"(cpu|cuda|xpu|mps)(:\d+)?", str(value)):
        raise InputError(f"{name}: expected cpu, cuda, cuda:N, xpu or mps, got {value!r}")
    return None if value is None else str(value)


def prompts(name: str, value: Any) -> int | tuple[str, ...]:
    """Read a number of prompts, or a text file with one prompt per line."""
    if isinstance(value, int) or str(value).lstrip("+-").isdigit():
        return read_whole(name, value, 1)
    return lines(name, value)


def lines(name: str, value: Any) -> tuple[str, ...]:
    """Read a text file with one prompt per line."""
    if not isinstance(value, str):
        return tuple(str(one) for one in _items(name, value))
    try:
        found = Path(value).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: expected UTF-8 text in {value}, got {error.reason}") from None
    texts = tuple(line.strip() for line in found if line.strip())
    if not texts:
        raise InputError(f"{name}: expected one prompt per line in {value}, got none")
    return texts


def file_there(name: str, value: Path) -> None:
    """Check that a file is there."""
    if not value.is_file():
        raise InputError(f"{name}: expected a file, got {str(value)!r}")


def folder_there(name: str, value: Path) -> None:
    """Check that a folder is there."""
    if not value.is_dir():
        raise InputError(f"{name}: expected a folder, got {str(value)!r}")


def folder_to_write(name: str, value: Path) -> None:
    """Check that a folder can be written or made, without leaving anything in it."""
    if value.exists() and not value.is_dir():
        raise InputError(f"{name}: expected a folder, got the file {str(value)!r}")
    _writable(name, value, value)


def file_to_write(suffix: str) -> Callable[[str, Path], None]:
    """Return a check that a file of that suffix can be written, without leaving one."""

    def probe(name: str, value: Path) -> None:
        if value.suffix != suffix:
            raise InputError(f"{name}: expected a file ending in {suffix}, got {str(value)!r}")
        if value.is_dir():
            raise InputError(f"{name}: expected a file, got the folder {str(value)!r}")
        _writable(name, value.parent, value)

    return probe


def _writable(name: str, folder: Path, value: Path) -> None:
    existing = folder.absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise InputError(f"{name}: expected a path below folders, got {str(value)!r}")
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise InputError(
            f"{name}: expected a place that can be written, got {str(value)!r} ({error.strerror})"
        ) from None


def _items(name: str, value: Any) -> Iterable[Any]:
    if not isinstance(value, list | tuple):
        raise InputError(f"{name}: expected a list, got {value!r}")
    return value
