# SPDX-License-Identifier: Apache-2.0
"""Options of the command line as values; what is wrong raises ValueError or OSError."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

Pairs = dict[str, list[tuple[str, str]]]


def strengths(text: str) -> tuple[float, ...]:
    """Read "0,2,4" or "-8:8:9" (low, high, count); sorted, 0 added if it is not among them."""
    parts = text.split(":")
    if len(parts) == 3:
        low, high = _number("--strengths", parts[0]), _number("--strengths", parts[1])
        count = whole("--strengths lo:hi:n, n", parts[2], 2)
        if not low < high:
            raise ValueError(f"--strengths: expected lo < hi in lo:hi:n, got {text!r}")
        values = [low + (high - low) * index / (count - 1) for index in range(count)]
    elif len(parts) == 1:
        values = [_number("--strengths", part) for part in text.split(",")]
    else:
        raise ValueError(f"--strengths: expected a,b,c or lo:hi:n, got {text!r}")
    if len(set(values)) != len(values):
        raise ValueError(f"--strengths: expected every strength once, got {text!r}")
    return tuple(sorted({0.0, *(value + 0.0 for value in values)}))


def whole(name: str, text: str, least: int) -> int:
    """Read a whole number of at least `least`."""
    try:
        value = int(text)
    except ValueError:
        raise ValueError(f"{name}: expected a whole number, got {text!r}") from None
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
    return value


def finite(name: str, text: str, *, least: float = -math.inf) -> float:
    """Read a finite number of at least `least`."""
    value = _number(name, text)
    if value < least:
        raise ValueError(f"{name}: expected at least {least:g}, got {value:g}")
    return value


def window(name: str, text: str | None) -> tuple[int | float, int | float] | None:
    """Read "A:B", two step numbers or two fractions of a run; None = all."""
    if text is None:
        return None
    parts = text.split(":")
    if len(parts) != 2:
        raise ValueError(f"{name}: expected A:B, got {text!r}")
    if all(part.lstrip("+-").isdigit() for part in parts):
        start, stop = (whole(name, part, 0) for part in parts)
        if start >= stop:
            raise ValueError(f"{name}: expected A < B in A:B, got {text!r}")
        return start, stop
    first, last = (finite(name, part) for part in parts)
    if not 0.0 <= first < last <= 1.0:
        raise ValueError(f"{name}: expected fractions 0 <= A < B <= 1 in A:B, got {text!r}")
    return first, last


def span(name: str, text: str | None) -> slice | None:
    """Read "A:B" or "A:B:STEP" with any part left out, as in Python; None = all."""
    if text is None:
        return None
    parts = text.split(":")
    try:
        values = [int(part) if part else None for part in parts]
    except ValueError:
        values = []
    if len(values) not in (2, 3):
        raise ValueError(f"{name}: expected A:B or A:B:STEP, got {text!r}")
    found = slice(*values)
    if found.step is not None and found.step < 1:
        raise ValueError(f"{name}: expected STEP >= 1, got {text!r}")
    return found


def seeds(texts: Sequence[str]) -> tuple[int, ...]:
    """Read seeds given as "0 1 2" or "0,1,2"."""
    values = [whole("--seeds", part, 0) for text in texts for part in text.split(",")]
    if len(set(values)) != len(values):
        raise ValueError(f"--seeds: expected every seed once, got {' '.join(map(str, values))}")
    return tuple(values)


def chosen(name: str, text: str, known: Iterable[str]) -> tuple[str, ...]:
    """Read a comma list of known words."""
    words, known = [word.strip() for word in text.split(",")], list(known)
    unknown = [word for word in words if word not in known]
    if unknown:
        raise ValueError(f"{name}: expected {' | '.join(known)}, got {unknown[0]!r}")
    return tuple(dict.fromkeys(words))


def concepts(text: str | None) -> tuple[str, ...]:
    """Read a comma list of concepts, "all", or None for the default ones."""
    from sidechain.zoo.music.concepts import CONCEPTS, DEFAULT_CONCEPTS

    if text is None:
        return tuple(DEFAULT_CONCEPTS)
    return tuple(CONCEPTS) if text == "all" else chosen("--concepts", text, CONCEPTS)


def concept(text: str) -> str:
    """Read the name of one concept."""
    from sidechain.zoo.music.concepts import CONCEPTS

    if text not in CONCEPTS:
        raise ValueError(f"--concept: expected {' | '.join(CONCEPTS)}, got {text!r}")
    return text


def localization_prompts(path: str) -> Pairs:
    """Read a CSV with columns concept,clean_prompt,corrupted_prompt: pairs by concept."""
    from sidechain.metrics.tables import read_table
    from sidechain.zoo.music.concepts import CONCEPTS

    pairs: Pairs = {}
    for row in read_table(
        path, text=("concept", "clean_prompt", "corrupted_prompt"), name="--prompts"
    ):
        (concept,) = chosen("--prompts, column concept", str(row["concept"]), CONCEPTS)
        pair = (str(row["clean_prompt"]), str(row["corrupted_prompt"]))
        pairs.setdefault(concept, []).append(pair)
    return pairs


def contrast_prompts(path: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Read a CSV with columns positive,negative: both columns."""
    from sidechain.metrics.tables import read_table

    rows = read_table(path, text=("positive", "negative"), name="--prompts")
    return (
        tuple(str(row["positive"]) for row in rows),
        tuple(str(row["negative"]) for row in rows),
    )


def test_prompts(text: str) -> int | tuple[str, ...]:
    """Read a number of held-out prompts, or a text file with one prompt per line."""
    if text.lstrip("+-").isdigit():
        return whole("--prompts", text, 1)
    return lines("--prompts", text)


def lines(name: str, path: str) -> tuple[str, ...]:
    """Read a text file with one prompt per line."""
    try:
        found = Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: expected UTF-8 text in {path}, got {error.reason}") from None
    prompts = tuple(line.strip() for line in found if line.strip())
    if not prompts:
        raise ValueError(f"{name}: expected one prompt per line in {path}, got none")
    return prompts


def model(text: str) -> str:
    """Check "zoo:music" or an existing folder of a saved pipeline."""
    if text.startswith("zoo:"):
        if text != "zoo:music":
            raise ValueError(f"--model: expected zoo:music or a folder, got {text!r}")
    elif not Path(text).is_dir():
        raise ValueError(
            f"--model: expected zoo:music or a folder of a saved pipeline, got {text!r}"
        )
    return text


def readable(name: str, text: str) -> Path:
    """Check that a file is there."""
    path = Path(text)
    if not path.is_file():
        raise FileNotFoundError(f"{name}: expected a file, got {text!r}")
    return path


def existing(name: str, text: str) -> Path:
    """Check that a folder is there."""
    path = Path(text)
    if not path.is_dir():
        raise NotADirectoryError(f"{name}: expected a folder, got {text!r}")
    return path


def folder(text: str) -> Path:
    """Check that a folder can be written or made; nothing is left behind."""
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"--out: expected a folder, got the file {text!r}")
    _probe(path, text)
    return path


def target(text: str, suffix: str) -> Path:
    """Check that a file of that suffix can be written; nothing is left behind."""
    path = Path(text)
    if path.suffix != suffix:
        raise ValueError(f"--out: expected a file ending in {suffix}, got {text!r}")
    if path.is_dir():
        raise IsADirectoryError(f"--out: expected a file, got the folder {text!r}")
    _probe(path.parent, text)
    return path


def _probe(path: Path, text: str) -> None:
    existing = path.absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise NotADirectoryError(f"--out: expected a path below folders, got {text!r}")
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise PermissionError(
            f"--out: expected a place that can be written, got {text!r} ({error.strerror})"
        ) from None


def _number(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {text!r}")
    return value
