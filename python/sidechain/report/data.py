# SPDX-License-Identifier: Apache-2.0
"""The blocks of a page, as plain data; `sidechain.report.html` renders them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Text:
    """Paragraphs."""

    kind: ClassVar[str] = "text"
    paragraphs: Sequence[str]
    soft: bool = False


@dataclass(frozen=True)
class Bullets:
    """A list of sentences."""

    kind: ClassVar[str] = "bullets"
    items: Sequence[str]


@dataclass(frozen=True)
class Heading:
    """A heading within a section."""

    kind: ClassVar[str] = "heading"
    text: str


@dataclass(frozen=True)
class Table:
    """A table that scrolls in its own box.

    Attributes:
        title: of the table.
        columns: their names.
        rows: cells, shown as they are; floats with two decimals, intervals with their ends.
        caption: a remark beside the title.
        folded: whether a reader has to open it.
    """

    kind: ClassVar[str] = "table"
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    caption: str = ""
    folded: bool = False


@dataclass(frozen=True)
class Picture:
    """A figure in all variants, as `sidechain.report.html.picture` draws it.

    Attributes:
        sources: (media query, data URI, pixels wide, pixels high) of each variant.
        alt: what it shows, for who cannot see it.
        caption: text below.
    """

    kind: ClassVar[str] = "picture"
    sources: Sequence[tuple[str, str, int, int]]
    alt: str
    caption: str


@dataclass(frozen=True)
class Meter:
    """A share between 0 and 1, drawn as a bar; `effect` or else what was kept."""

    name: str
    value: float
    effect: bool = True


@dataclass(frozen=True)
class Clip:
    """A sound to hear and see, or another item to look at.

    Attributes:
        name: what tells it from the others of its strip.
        audio: samples [T] or [T, channels] in -1 .. 1, or None.
        mel: log-mel spectrogram [frames, bins], low bins first, or None.
        meters: shares below it.
        note: a remark below it.
        place: a moment to mark, as a share of the length.
        trace: a curve along the clip, drawn as bars; None without one.
        base: whether the others are compared with it.
        image: bytes of a PNG to show, or None.
        text: a text to show, or "".
    """

    name: str
    audio: NDArray[np.floating[Any]] | None = None
    mel: NDArray[np.floating[Any]] | None = None
    meters: Sequence[Meter] = ()
    note: str = ""
    place: float | None = None
    trace: Sequence[float] | None = None
    base: bool = False
    image: bytes | None = None
    text: str = ""


@dataclass(frozen=True)
class Strip:
    """Clips side by side, on one colour scale; the row scrolls sideways.

    Attributes:
        title: of the row.
        about: what the clips share, in small print beside the title.
        clips: from left to right.
        caption: text below.
        sample_rate: of the audio, in Hz.
    """

    kind: ClassVar[str] = "strip"
    title: str
    about: str
    clips: Sequence[Clip]
    caption: str = ""
    sample_rate: int = 16000


@dataclass(frozen=True)
class Facts:
    """Lists of names and values side by side, by title."""

    kind: ClassVar[str] = "facts"
    lists: Mapping[str, Mapping[str, object]]


@dataclass(frozen=True)
class Commands:
    """Shell commands."""

    kind: ClassVar[str] = "commands"
    lines: Sequence[str]


@dataclass(frozen=True)
class Files:
    """Files beside the page: path relative to it, and what is in it."""

    kind: ClassVar[str] = "files"
    about: Mapping[str, str]


Block = Text | Bullets | Heading | Table | Picture | Strip | Facts | Commands | Files


@dataclass(frozen=True)
class Section:
    """A part of a page; without blocks it is left out."""

    anchor: str
    heading: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """Everything one page shows.

    Attributes:
        title: headline.
        summary: one paragraph under the headline.
        findings: what came out, one sentence each, the most important first.
        sections: in order.
    """

    title: str
    summary: str = ""
    findings: Sequence[str] = ()
    sections: Sequence[Section] = ()
