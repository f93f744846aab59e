# SPDX-License-Identifier: Apache-2.0
"""Small trained models that ship with the package, and the recipes that made them."""

from __future__ import annotations

from typing import Any

# The folder `music` is imported first: loaded later, it would take the place of the function.
from . import music as _music  # noqa: F401
from .load import dictionaries, dictionary, dictionary_file, localized, music, scorers

__all__ = [
    "dictionaries",
    "dictionary",
    "dictionary_file",
    "localized",
    "music",
    "music_tagger",
    "scorers",
]


def __getattr__(name: str) -> Any:
    if name == "music_tagger":  # its module needs diffusers and librosa
        from .music.musicnn import music_tagger

        return music_tagger
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
