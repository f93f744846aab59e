# SPDX-License-Identifier: Apache-2.0
"""Dictionaries by the name of a repository on the Hugging Face hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..._errors import InputError
from . import dictionary_learning, saelens, sparsify

_PART = r"[A-Za-z0-9_][\w.\-]*"
#: owner/name[/subfolder][@revision]
_NAME = re.compile(rf"({_PART}/{_PART})((?:/(?!\.\.?(?:[/@]|$))[^/@]+)*)(?:@(.+))?")
#: Files that hold a dictionary: nothing else of a repository is fetched.
OWN = "sae.safetensors"
FILES = (
    sparsify.CONFIG,
    sparsify.WEIGHTS,
    saelens.WEIGHTS,
    dictionary_learning.CONFIG,
    dictionary_learning.WEIGHTS,
)


def located(start: str | os.PathLike[str]) -> Path:
    """Return the place of a dictionary: a path that exists, or the copy of a hub's repository.

    Args:
        start: a path, or a hub id "owner/name[/subfolder or file][@revision]"; what exists here is
            a path, whatever it looks like.

    Raises:
        FileNotFoundError: there is neither, or it cannot be fetched.
        InputError: the hub's client is not installed.
    """
    place = Path(start)
    named = _NAME.fullmatch(start) if isinstance(start, str) else None
    if named is None or place.exists():
        return place
    repository, inside, revision = named[1], named[2].strip("/"), named[3]
    root = _fetched(str(start), repository, inside, revision)
    found = root / inside
    if not found.is_file() and not any((found / name).is_file() for name in FILES):
        raise FileNotFoundError(
            f"formats: expected one of {', '.join(FILES)} in {start!r} on the hub, got none"
            f"{_offline()}"
        )
    return found


def _fetched(start: str, repository: str, inside: str, revision: str | None) -> Path:
    """Return the folder of the repository in the cache, with the files of a dictionary."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    except ImportError:
        raise InputError(
            f"formats: expected a file or folder, or the package huggingface_hub to fetch {start!r}"
            ", got neither"
        ) from None
    folder = f"{inside}/" if inside else ""
    patterns = [f"{folder}{name}" for name in FILES]
    if inside.endswith(".safetensors"):
        patterns = [inside]
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        asked = repository if revision is None else f"{repository}@{revision}"
        reason = " ".join(str(error).split()) or type(error).__name__
        raise FileNotFoundError(
            f"formats: expected a dictionary, got nothing at {start} here and no repository "
            f"{asked} on the hub{_offline() or f': {reason}'}"
        ) from None


def _offline() -> str:
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE:
        return ""
    return f" [offline by HF_HUB_OFFLINE: only the cache {constants.HF_HUB_CACHE} is looked at]"
